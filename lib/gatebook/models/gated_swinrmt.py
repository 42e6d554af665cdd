"""Gated-SwinRMT: Swin windows, retention with Manhattan decay, and gates (arXiv 2604.06014).

Only the abstract could be read. Everything marked [R] is a reconstruction from what the abstract
names: RMT (arXiv 2309.11523; macro design, block, decay), SWAT (2502.18845; sigmoid scores) and
the gate "G1" of gated attention (2505.06708).

Shapes:
    B   images             h, w  rows and columns of a map, tokens
    C   channels           H     heads               d  channels of a head, C / H
    M   side of a window   nW    windows of a map    K  classes
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.errors import unknown
from gatebook.layers.vision import (
    Classifier,
    ConvBN,
    DepthwiseConv,
    DropPath,
    merge_windows,
    partition_windows,
)

CHOICES = {"scores": ("softmax", "sigmoid"), "gate": ("none", "elementwise", "head")}


@dataclass(frozen=True, kw_only=True)
class GatedSwinRMTConfig:
    """Sizes and choices of a Gated-SwinRMT or of its baseline, RMT.

    Raises:
        ValueError: Sizes that do not fit, or unknown choices.
    """

    widths: tuple[int, ...]  # C of each stage
    depths: tuple[int, ...]  # blocks of each stage
    n_heads: tuple[int, ...]  # H of each stage
    window_size: int = 7  # M, tokens; a smaller map lowers it; 0: no windows (RMT)
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of retention and of SWAT
    gate: Literal["none", "elementwise", "head"] = "none"  # G1, before the output projection
    value_gate: bool = False  # V is multiplied by SiLU(X W_U) (SWAT)
    full_last: bool = False  # the last stage attends over the whole map in one pass (RMT)
    ffn_ratio: float = 3.0  # r, hidden channels of the FFN for each channel
    decay_start: float = 2.0  # a: the first head has gamma = 1 - 2^-a
    decay_spans: tuple[float, ...] = (4, 4, 6, 6)  # b of each stage: the last is near 1 - 2^-(a+b)
    stem_stride: Literal[2, 4] = 4  # pixels between tokens of the first stage
    projection: int = 1024  # channels before the mean over the map
    image_size: int = 224  # side of the square image, pixels
    in_channels: int = 3  # channels of the image
    n_classes: int = 100  # K
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0

    def __post_init__(self):
        """Refuse what does not fit."""
        counts = [len(part) for part in (self.widths, self.depths, self.n_heads, self.decay_spans)]
        if len(set(counts)) > 1:
            raise ValueError(f"widths, depths, n_heads and decay_spans have lengths {counts}")
        _check_choices(scores=self.scores, gate=self.gate, window_size=self.window_size)
        if self.stem_stride not in (2, 4):
            raise ValueError(f"stem_stride is {self.stem_stride}; it must be 2 or 4")
        if self.full_last and (self.window_size or self.scores != "softmax"):
            raise ValueError("full_last is for window_size=0 and softmax scores, as in RMT")
        if self.image_size % self.stem_stride:
            raise ValueError(f"image_size {self.image_size} is no multiple of {self.stem_stride}")
        for stage in range(len(self.depths) - 1):
            if self.stage_side(stage) % 2:
                side = self.stage_side(stage)
                raise ValueError(f"the {side}x{side} map of stage {stage + 1} can't be halved")

    def stage_side(self, stage: int) -> int:
        """Side of the stage's map, tokens."""
        return self.image_size // (self.stem_stride * 2**stage)


def _check_choices(*, scores: str, gate: str, window_size: int) -> None:
    """Refuse what no layer knows."""
    for kind, value in (("scores", scores), ("gate", gate)):
        if value not in CHOICES[kind]:
            raise ValueError(unknown(kind, value, CHOICES[kind]))
    if window_size < 0:
        raise ValueError(f"window_size is {window_size}; it must be 0 (no windows) or positive")


def log_decays(n_heads: int, start: float, span: float) -> Tensor:
    """`log gamma_h` of each head, `[H]`: `gamma_h = 1 - 2^(-a - b h / H)` (RMT).

    Raises:
        ValueError: `a` is not positive, so that the first gamma is no positive number.
    """
    if start <= 0:
        raise ValueError(f"decay_start is {start}; it must be positive")
    return torch.log1p(-torch.exp2(-start - span * torch.arange(n_heads) / n_heads))


def balanced_slopes(n_heads: int) -> Tensor:
    """Slopes `s_h` of the sigmoid's logits, `[H]`: -2^-k, then 2^-k, k = 1..H/2 (SWAT).

    Which half of the heads comes first is a choice of ours [R].

    Raises:
        ValueError: An odd number of heads.
    """
    if n_heads % 2:
        raise ValueError(f"balanced slopes need an even number of heads, got {n_heads}")
    half = torch.exp2(-torch.arange(1, n_heads // 2 + 1, dtype=torch.get_default_dtype()))
    return torch.cat([-half, half])


class GatedRetention(nn.Module):
    """Decomposed attention with decay in shifted windows, local context, and a gate.

    With `L_ij = |i - j| log gamma_h`, along the width and then along the height of a window:

        softmax:  A = softmax(Q K^T / sqrt(d) + L)                      (retention)
        sigmoid:  A = sigmoid(Q K^T / sqrt(d) + s_h |i - j|) exp(L) / M (SWAT; / M is [R])

    Then `Y = W_O (sigmoid(X W_G + b_G) * (A_height A_width V + LCE(V)))`.

    Args:
        d_model: Channels C.
        n_heads: Heads H.
        side: Side of the square map, tokens.
        window_size: Side M of a window, at most the map's; 0 attends over the whole map.
        shift: Whether the windows are shifted by `M // 2`; never where one covers the map.
        scores: "softmax" or "sigmoid".
        gate: "none", "elementwise" (C gates a token) or "head" (H gates a token).
        value_gate: Whether V is multiplied by `SiLU(X W_U)`.
        full: One pass over all tokens with `L = (|i - i'| + |j - j'|) log gamma_h` (RMT's last
            stage) in the place of two.
        decay_start: a of `log_decays`.
        decay_span: b of `log_decays`.

    Raises:
        ValueError: Heads or windows that do not divide, or an unknown choice.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        side: int,
        *,
        window_size: int = 0,
        shift: bool = False,
        scores: str = "softmax",
        gate: str = "none",
        value_gate: bool = False,
        full: bool = False,
        decay_start: float = 2.0,
        decay_span: float = 4.0,
    ):
        super().__init__()
        _check_choices(scores=scores, gate=gate, window_size=window_size)
        if d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide d_model={d_model}")
        self.n_heads, self.side, self.scores, self.full = n_heads, side, scores, full
        self.window_size = min(window_size, side)
        self.shift = window_size // 2 if shift and 0 < window_size < side else 0
        if self.window_size and side % self.window_size:
            raise ValueError(f"a map of side {side} has no whole windows of side {window_size}")
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.value_gate = nn.Linear(d_model, d_model) if value_gate else None
        self.lce = DepthwiseConv(d_model, 5)
        n_gates = {"none": 0, "elementwise": d_model, "head": n_heads}[gate]
        self.gate = nn.Linear(d_model, n_gates) if n_gates else None
        self.out = nn.Linear(d_model, d_model)
        self._initialise()
        place = torch.arange(self.window_size or side)
        distance = (place[:, None] - place).abs()  # [n, n]
        if full:
            pairs = torch.cartesian_prod(place, place)
            distance = (pairs[:, None] - pairs).abs().sum(-1)  # Manhattan, [N, N]
        decay = log_decays(n_heads, decay_start, decay_span)[:, None, None, None] * distance
        slope = None
        if scores == "sigmoid":
            decay = decay.exp() / len(place)
            slope = balanced_slopes(n_heads)[:, None, None, None] * distance
        self.register_buffer("decay", decay, persistent=False)  # [H, 1, n, n]
        self.register_buffer("slope", slope, persistent=False)  # [H, 1, n, n]
        rows, columns = self._apart(side) if self.shift else (None, None)
        self.register_buffer("rows_apart", rows, persistent=False)  # [nW, 1, 1, M, M]
        self.register_buffer("columns_apart", columns, persistent=False)

    def _initialise(self) -> None:
        """RMT's layer: Xavier normal, gain 2^-2.5 for what reads X; gates likewise [R]."""
        for layer in (self.qkv, self.value_gate, self.gate, self.out):
            if layer is not None:
                gain = 1.0 if layer is self.out else 2**-2.5
                for part in layer.weight.chunk(3 if layer is self.qkv else 1):
                    nn.init.xavier_normal_(part, gain)
                nn.init.zeros_(layer.bias)

    def _apart(self, side: int) -> tuple[Tensor, Tensor]:
        """Pairs that the roll brought together from opposite edges, by rows and by columns."""
        wrapped = (torch.arange(side) >= side - self.shift).unflatten(0, (-1, self.window_size))
        apart = (wrapped[:, :, None] != wrapped[:, None])[:, None, None]  # [h/M, 1, 1, M, M]
        return apart.repeat_interleave(len(apart), 0), apart.repeat(len(apart), 1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of a map `[B, h, w, C]`.

        Raises:
            ValueError: The map has another side than the layer's.
        """
        if x.ndim != 4 or x.shape[1:3] != (self.side, self.side):
            raise ValueError(
                f"a map of shape {list(x.shape)}; expected [B, {self.side}, {self.side}, C]"
            )
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.value_gate is not None:
            v = v * F.silu(self.value_gate(x))
        y = self.attend(q, k, v) + self.lce(v)  # LCE on the whole map, which is not shifted [R]
        return self.out(y if self.gate is None else y * self.gates(x))

    def gates(self, x: Tensor) -> Tensor:
        """G1 for each channel, `[B, h, w, C]`; it reads the normed input of the block [R]."""
        scores = self.gate(x).sigmoid()
        return scores.repeat_interleave(x.shape[-1] // scores.shape[-1], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Both passes inside each window: width first, then height. `[B, h, w, C]` each."""
        height = v.shape[1]
        q, k, v = (self._split(part) for part in (q, k, v))  # [B, nW, H, n, n, d]
        if self.full:
            q, k, v = (part.flatten(3, 4)[:, :, :, None] for part in (q, k, v))
            y = (self.weights(q, k) @ v).unflatten(4, (height, -1))[:, :, :, 0]
            return self._join(y, height)
        v = self.weights(q, k, self.columns_apart) @ v  # along the width
        q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
        y = self.weights(q, k, self.rows_apart) @ v  # along the height
        return self._join(y.transpose(-3, -2), height)

    def weights(self, q: Tensor, k: Tensor, apart: Tensor | None = None) -> Tensor:
        """The matrices A of one pass.

        Args:
            q: Queries `[B, nW, H, lines, n, d]`.
            k: Keys, of the same shape.
            apart: Pairs that must not meet, `[nW, 1, 1, n, n]`.

        Returns:
            `[B, nW, H, lines, n, n]`, the query before the key.
        """
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.scores == "softmax":
            logits = logits + self.decay
            return (logits if apart is None else logits.masked_fill(apart, -torch.inf)).softmax(-1)
        a = (logits + self.slope).sigmoid() * self.decay
        return a if apart is None else a.masked_fill(apart, 0)

    def _split(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the windows' heads `[B, nW, H, M, M, d]`."""
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        m = self.window_size
        x = partition_windows(x, m).unflatten(2, (m, m)) if m else x[:, None]
        return x.unflatten(-1, (self.n_heads, -1)).movedim(-2, 2)

    def _join(self, x: Tensor, height: int) -> Tensor:
        """The inverse of `_split`."""
        x = x.movedim(2, -2).flatten(-2)  # [B, nW, M, M, C]
        m = self.window_size
        x = merge_windows(x.flatten(2, 3), m, height) if m else x[:, 0]
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class FeedForward(nn.Module):
    """Linear, GELU, add a depthwise 3x3 convolution, Linear (RMT)."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        self.conv = DepthwiseConv(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the same shape."""
        x = F.gelu(self.up(x))
        return self.down(x + self.conv(x))


class Block(nn.Module):
    """x += DWConv(x); x += mixer(LN(x)); x += FFN(LN(x)) (RMT).

    Args:
        d_model: Channels C.
        mixer: Mixes a map `[B, h, w, C]`.
        hidden: Hidden channels of the FFN.
        drop_path: Stochastic depth of the last two branches.
    """

    def __init__(self, d_model: int, mixer: nn.Module, hidden: int, drop_path: float = 0.0):
        super().__init__()
        self.position = DepthwiseConv(d_model, 3)
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, eps=1e-6) for _ in range(2))
        self.mixer, self.ffn = mixer, FeedForward(d_model, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the same shape."""
        x = x + self.position(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class GatedSwinRMT(nn.Module):
    """The classifier: stem, stages with a strided convolution between them, head (RMT's macro).

    Convolutions before a BatchNorm have no bias here, which RMT's have; nothing depends on it.
    """

    def __init__(self, config: GatedSwinRMTConfig):
        super().__init__()
        self.config, widths = config, config.widths
        sizes = [config.in_channels, widths[0] // 2, widths[0] // 2, widths[0], widths[0]]
        strides = (2, 1, config.stem_stride // 2, 1)
        stem: list[nn.Module] = []
        for number, stride in enumerate(strides):
            stem += [ConvBN(*sizes[number : number + 2], 3, stride=stride), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-1])
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        self.stages = nn.ModuleList(
            nn.Sequential(*(self._block(stage, i, rates.pop(0)) for i in range(depth)))
            for stage, depth in enumerate(config.depths)
        )
        self.merges = nn.ModuleList(
            ConvBN(*widths[i : i + 2], 3, stride=2) for i in range(len(widths) - 1)
        )
        self.project = nn.Sequential(ConvBN(widths[-1], config.projection), nn.SiLU())
        self.classifier = Classifier(config.projection, config.n_classes, norm="none")
        self.apply(_initialise)

    def _block(self, stage: int, index: int, drop_path: float) -> Block:
        c = self.config
        mixer = GatedRetention(
            c.widths[stage],
            c.n_heads[stage],
            c.stage_side(stage),
            window_size=c.window_size,
            shift=index % 2 == 1,
            scores=c.scores,
            gate=c.gate,
            value_gate=c.value_gate,
            full=c.full_last and stage == len(c.depths) - 1,
            decay_start=c.decay_start,
            decay_span=c.decay_spans[stage],
        )
        return Block(c.widths[stage], mixer, round(c.ffn_ratio * c.widths[stage]), drop_path)

    def features(self, images: Tensor) -> list[Tensor]:
        """Output of each stage, `[B, h, w, C]`, finest first.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        channels, side = self.config.in_channels, self.config.image_size
        if images.shape[1:] != (channels, side, side):
            raise ValueError(
                f"images of shape {list(images.shape)}; expected [B, {channels}, {side}, {side}]"
            )
        maps, x = [], self.stem(images)
        for stage, blocks in enumerate(self.stages):
            x = blocks((self.merges[stage - 1](x) if stage else x).permute(0, 2, 3, 1))
            maps.append(x)
            x = x.permute(0, 3, 1, 2)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, K]`.
        """
        x = self.project(self.features(images)[-1].permute(0, 3, 1, 2))
        return self.classifier(x.permute(0, 2, 3, 1))


def _initialise(module: nn.Module) -> None:
    """Every Linear anew from N(0, 0.02^2) with biases 0, as RMT's model-wide rule does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# Sizes are not published. With these widths RMT has the stated 77 to 79 M parameters for 100
# classes; an FFN ratio of 2.5 in the place of 3 makes room for a gate of C x C weights [R].
_SIZES = {
    "widths": (128, 256, 512, 1024),
    "depths": (2, 2, 18, 2),
    "n_heads": (4, 8, 16, 32),
    "drop_path": 0.1,  # DeiT's [R]
}
MODELS: dict[str, tuple[type[nn.Module], GatedSwinRMTConfig]] = {
    "rmt_78m": (GatedSwinRMT, GatedSwinRMTConfig(**_SIZES, window_size=0, full_last=True)),
    "gated_swinrmt_retention": (
        GatedSwinRMT,
        GatedSwinRMTConfig(**_SIZES, gate="elementwise", ffn_ratio=2.5),
    ),
    "gated_swinrmt_swat": (
        GatedSwinRMT,
        GatedSwinRMTConfig(**_SIZES, scores="sigmoid", value_gate=True, ffn_ratio=2.5),
    ),
}
