"""MossFormer (Zhao and Ma, 2023, arXiv 2302.11824): time-domain separation of speakers.

Follows the abstract and the code that its authors released; the paper's body was not read
(modelscope, `models/audio/separation/mossformer*.py`). Symbols and shapes:

    B  batch            N  encoder filters       P  chunk length, frames
    L  samples          D  width of the trunk    H  chunks, ceil(S / P)
    S  frames           d  query/key width       C  speakers

    x, mixture (B, L);  X, encoding (B, S, N);  trunk (B, S, D);  masks (B, C, S, N)

Channels come last throughout, so that a 1x1 convolution is a `Linear`.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = ("joint", "local", "global", "chunked", "dual")


@dataclass(frozen=True, kw_only=True)
class MossFormerConfig:
    """Sizes of a MossFormer, and the switches of its ablations.

    Raises:
        ValueError: for an unknown kind of attention, an odd stride or an odd rotary width.
    """

    n_filters: int  # N, filters of the encoder
    d_model: int  # D, width of the trunk; values and gates are 2 D wide
    n_layers: int  # R, blocks
    kernel_size: int = 16  # K, samples in one encoder frame; the stride is K / 2
    d_qk: int = 128  # d, width of queries and keys
    chunk_size: int = 256  # P, frames in one chunk of the local attention
    rotary_dim: int = 32  # leading query/key channels that are rotated
    conv_kernel: int = 17  # frames seen by the depthwise convolutions
    n_speakers: int = 2  # C, outputs
    dropout: float = 0.1  # in convolution modules and on the local attention matrix
    attention: str = "joint"  # "joint" is the paper's; the others are this book's controls
    gating: bool = True  # False replaces the products of eq. "gates" by sums
    convolution: bool = True  # False drops the depthwise convolutions
    norm_over_time: bool = True  # False: the mask net's outer norms see one frame at a time

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r}: choose one of {', '.join(ATTENTION)}")
        if self.kernel_size % 2 or self.rotary_dim % 2 or self.rotary_dim > self.d_qk:
            raise ValueError("kernel_size and rotary_dim must be even, and rotary_dim <= d_qk")


# ---------------------------------------------------------------- joint attention


def to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """Cuts x (B, S, a) into chunks, (B, H, P, a), with zeros after the end."""
    padding = -x.shape[1] % chunk_size
    return F.pad(x, (0, 0, 0, padding)).unflatten(1, (-1, chunk_size))


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, dropout: float = 0.0
) -> Tensor:
    """Squared-ReLU attention inside chunks: `A_h = ReLU(Q_h K_h^T / P)^2`, `A_h V_h`.

    The score is divided by the chunk length P, not by sqrt(d), also in a chunk that is partly
    padding. Padded keys are zero and so is their score: they need no mask.

    Args:
        q: queries (B, S, d).
        k: keys (B, S, d).
        v: values (B, S, E).
        chunk_size: P, in frames.
        dropout: probability with which an entry of A_h is dropped.

    Returns:
        (B, S, E).
    """
    S = q.shape[1]
    q, k, v = (to_chunks(t, chunk_size) for t in (q, k, v))
    scores = F.relu(q @ k.mT / chunk_size).square()  # (B, H, P, P)
    return (F.dropout(scores, dropout) @ v).flatten(1, 2)[:, :S]


def global_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention over the whole sequence: `Q' (K'^T V) / S`, in O(S d E) operations.

    S is the true number of frames, without the padding of the local half.

    Args:
        q: queries (..., S, d).
        k: keys (..., S, d).
        v: values (..., S, E).

    Returns:
        (..., S, E).
    """
    return q @ (k.mT @ v / q.shape[-2])


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """A control, not part of MossFormer: the linear half, but each chunk reads itself only.

    Shapes as in `local_attention`.
    """
    chunks = (to_chunks(t, chunk_size) for t in (q, k, v))
    return global_attention(*chunks).flatten(1, 2)[:, : q.shape[1]]


def across_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """A rival, not part of MossFormer: the long-range half of dual-path processing.

    Frames with one offset in all chunks attend to each other, `(o, P + o, 2 P + o, …)`, by the
    same squared ReLU, divided by their number H. Shapes as in `local_attention`.
    """
    S = q.shape[1]
    q, k, v = (to_chunks(t, chunk_size).transpose(1, 2) for t in (q, k, v))  # (B, P, H, ·)
    scores = F.relu(q @ k.mT / q.shape[2]).square()  # (B, P, H, H)
    return (scores @ v).transpose(1, 2).flatten(1, 2)[:, :S]


# ---------------------------------------------------------------- leaf modules


class ScaleNorm(nn.Module):
    """`g x / max(|x| a^(-1/2), 1e-5)` with one learned scalar g; a is the width of x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.scale = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        return x / norm.clamp(min=1e-5) * self.g


class GlobalNorm(nn.Module):
    """GroupNorm with one group: zero mean, unit variance over channels *and* time of x (B, S, a).

    The released code calls it "ln".
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], eps=1e-8) * self.weight + self.bias


class Rotary(nn.Module):
    """Rotary position embedding of the leading channels, by the absolute index of the frame.

    Channels (2i, 2i + 1) turn by `t 10000^(-2i / dim)`. The released code keeps the frequencies as
    a frozen parameter, which counts towards the model's size; all blocks share one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        freqs = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates x (..., S, d), frame t by t steps."""
        width = 2 * self.freqs.numel()
        t = torch.arange(x.shape[-2], device=x.device, dtype=self.freqs.dtype)
        angle = t[:, None] * self.freqs  # (S, dim / 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., 0:width:2], x[..., 1:width:2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        return torch.cat((turned, x[..., width:]), dim=-1)


class SinusoidalPosition(nn.Module):
    """`alpha [sin(t w), cos(t w)]`, `w_i = 10000^(-2i / D)`, with one learned scalar alpha."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        freqs = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, length: int) -> Tensor:
        """Returns the embedding of frames 0 … length - 1, (length, D)."""
        t = torch.arange(length, device=self.freqs.device, dtype=self.freqs.dtype)
        angle = t[:, None] * self.freqs
        return self.alpha * torch.cat((angle.sin(), angle.cos()), dim=-1)


def depthwise(z: Tensor, weight: Tensor) -> Tensor:
    """Convolves each channel of z (B, S, a) over time with its own weight (a, 1, 17), same length.

    A two-dimensional convolution with a channels-last input is six times as fast on a CPU as the
    one-dimensional one, which wants channels first.
    """
    image = z.mT.unsqueeze(-1)  # (B, a, S, 1), channels last in memory
    weight = weight.unsqueeze(-1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(image, weight, padding="same", groups=z.shape[-1]).squeeze(-1).mT


class ConvolutionModule(nn.Module):
    """`CM(x) = z + DWConv(z)`, `z = SiLU(Linear(ScaleNorm(x)))`, then dropout: (B, S, a→b)."""

    def __init__(self, d_in: int, d_out: int, config: MossFormerConfig) -> None:
        super().__init__()
        self.norm = ScaleNorm(d_in)
        self.linear = nn.Linear(d_in, d_out)
        self.depthwise = (
            nn.Conv1d(d_out, d_out, config.conv_kernel, padding="same", groups=d_out, bias=False)
            if config.convolution
            else None
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(self.linear(self.norm(x)))
        if self.depthwise is not None:
            z = z + depthwise(z, self.depthwise.weight)
        return self.dropout(z)


class OffsetScale(nn.Module):
    """Four affine copies of Z, `Z * gamma_i + beta_i`: local q, global q, local k, global k."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.02 * torch.randn(4, dim))
        self.beta = nn.Parameter(torch.zeros(4, dim))

    def forward(self, z: Tensor) -> Tensor:
        return z.unsqueeze(1) * self.gamma[:, None] + self.beta[:, None]  # (B, 4, S, d)


def token_shift(x: Tensor) -> Tensor:
    """Delays the first half of the channels of x (B, S, D) by one frame; frame 0 gets zeros."""
    first, rest = x.chunk(2, dim=-1)
    return torch.cat((F.pad(first, (0, 0, 1, -1)), rest), dim=-1)


# ---------------------------------------------------------------- the block


class MossFormerBlock(nn.Module):
    """Gated single-head attention with convolutions: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: MossFormerConfig, rotary: Rotary) -> None:
        super().__init__()
        D = config.d_model
        self.config = config
        self.rotary = rotary
        self.to_values = ConvolutionModule(D, 4 * D, config)
        self.to_qk = ConvolutionModule(D, config.d_qk, config)
        self.offset_scale = OffsetScale(config.d_qk)
        self.to_out = ConvolutionModule(2 * D, D, config)

    def attend(self, z: Tensor, values: Tensor) -> Tensor:
        """Mixes values (B, S, E) over time by queries and keys made from Z (B, S, d).

        Joint attention is the sum of a local and a global half; the others drop one half, or put
        something else in the place of the global one.
        """
        config, P = self.config, self.config.chunk_size
        q, q_far, k, k_far = self.rotary(self.offset_scale(z)).unbind(1)
        near = far = 0.0
        if config.attention != "global":
            dropout = config.dropout if self.training else 0.0
            near = local_attention(q, k, values, P, dropout)
        if config.attention in ("joint", "global"):
            far = global_attention(q_far, k_far, values)
        if config.attention == "chunked":
            far = chunked_attention(q_far, k_far, values, P)
        if config.attention == "dual":
            far = across_attention(q_far, k_far, values, P)
        return near + far

    def forward(self, x: Tensor) -> Tensor:
        shifted = token_shift(x)
        values = self.to_values(shifted)  # (B, S, 4 D), V and U side by side
        v, u = values.chunk(2, dim=-1)
        v_mixed, u_mixed = self.attend(self.to_qk(shifted), values).chunk(2, dim=-1)
        return x + self.to_out(self.gate(v, u, v_mixed, u_mixed))

    def gate(self, v: Tensor, u: Tensor, v_mixed: Tensor, u_mixed: Tensor) -> Tensor:
        """`O = (U' * V) * sigmoid(V' * U)`; without gating, the four terms are added instead.

        The sum keeps every parameter, every path and the cost, and takes away the products only.
        """
        if self.config.gating:
            return u_mixed * v * torch.sigmoid(v_mixed * u)  # (B, S, 2 D)
        return u_mixed + v + v_mixed + u


# ---------------------------------------------------------------- the model


class MaskNet(nn.Module):
    """Estimates one mask per speaker from the encoded mixture: (B, S, N) -> (B, C, S, N).

    The two outer norms average over the whole signal. Without `norm_over_time` they do not, and
    attention, convolutions and token shift alone carry information from frame to frame.
    """

    def __init__(self, config: MossFormerConfig) -> None:
        super().__init__()
        N, D, C = config.n_filters, config.d_model, config.n_speakers
        norm = GlobalNorm if config.norm_over_time else partial(nn.LayerNorm, eps=1e-8)
        self.norm_in = norm(N)
        self.linear_in = nn.Linear(N, D, bias=False)
        self.position = SinusoidalPosition(D)
        rotary = Rotary(config.rotary_dim)
        self.blocks = nn.ModuleList(MossFormerBlock(config, rotary) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.norm_out = norm(D)
        self.act = nn.PReLU()
        self.split = nn.Linear(D, C * D)
        self.value = nn.Linear(D, D)
        self.value_gate = nn.Linear(D, D)
        self.linear_out = nn.Linear(D, N, bias=False)

    def forward(self, encoding: Tensor) -> Tensor:
        h = self.linear_in(self.norm_in(encoding))  # (B, S, D)
        h = h + self.position(h.shape[1])
        x = h
        for block in self.blocks:
            x = block(x)
        x = self.act(self.norm_out(self.norm(x)) + h)
        x = self.split(x).unflatten(-1, (-1, h.shape[-1])).transpose(1, 2)  # (B, C, S, D)
        x = torch.tanh(self.value(x)) * torch.sigmoid(self.value_gate(x))
        return F.relu(self.linear_out(x))  # (B, C, S, N)


class MossFormer(nn.Module):
    """Separates a mixture into its speakers: (B, L) -> (B, C, L).

    `estimate_c = Decoder(X * M_c)`. Encoder and decoder are the paper's convolution and transposed
    convolution of kernel K and stride K / 2, written as products with overlapping frames.
    """

    def __init__(self, config: MossFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(config.kernel_size, config.n_filters, bias=False)
        self.mask_net = MaskNet(config)
        self.decoder = nn.Linear(config.n_filters, config.kernel_size, bias=False)
        nn.init.uniform_(self.decoder.weight, -(config.kernel_size**-0.5), config.kernel_size**-0.5)

    def encode(self, mixture: Tensor) -> Tensor:
        """Encodes a mixture (B, L) as non-negative frames X (B, S, N)."""
        K = self.config.kernel_size
        return F.relu(self.encoder(mixture.unfold(-1, K, K // 2)))

    def decode(self, encoding: Tensor, length: int) -> Tensor:
        """Turns masked encodings (B, C, S, N) into `length` samples each, (B, C, length)."""
        early, late = self.decoder(encoding).chunk(2, dim=-1)  # halves of a frame, (B, C, S, K / 2)
        wave = (F.pad(early, (0, 0, 0, 1)) + F.pad(late, (0, 0, 1, 0))).flatten(-2)
        return F.pad(wave, (0, length - wave.shape[-1]))

    def forward(self, mixture: Tensor) -> Tensor:
        encoding = self.encode(mixture)
        masks = self.mask_net(encoding)
        return self.decode(encoding.unsqueeze(1) * masks, mixture.shape[-1])


def n_frames(config: MossFormerConfig, samples: int) -> int:
    """Returns S, the number of encoder frames of a signal of `samples` samples."""
    return math.floor((samples - config.kernel_size) / (config.kernel_size // 2)) + 1


MODELS: dict[str, tuple[type[nn.Module], MossFormerConfig]] = {
    # MossFormer(L): 42 101 850 parameters, of which the 16 rotary frequencies are fixed.
    "mossformer_l": (MossFormer, MossFormerConfig(n_filters=512, d_model=512, n_layers=24)),
    # This book's sizes, for one GPU and for a CPU. The paper's S and M sizes are not known to us.
    "mossformer_medium": (
        MossFormer,
        MossFormerConfig(
            n_filters=128, d_model=96, n_layers=4, d_qk=64, chunk_size=128, dropout=0.0
        ),
    ),
    "mossformer_small": (
        MossFormer,
        MossFormerConfig(
            n_filters=64,
            d_model=48,
            n_layers=1,
            kernel_size=32,
            d_qk=32,
            chunk_size=16,
            rotary_dim=16,
            dropout=0.0,
            norm_over_time=False,
        ),
    ),
}
