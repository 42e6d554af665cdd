"""Scattering Vision Transformer: Spectral Mixing Matters (arXiv 2311.01310).

Early stages mix tokens in the bands of a dual-tree complex wavelet transform, later ones by
softmax attention.

Shapes:
    B   images               h, w   rows and columns of a stage's map, tokens
    C   channels             6      oriented complex bands, of h/2 x w/2
    N   tokens, h * w            n, d   blocks of a blending layer, width of one
    P   places

Maps are channels-last, `[B, h, w, C]`; inside the transform channels come first. Taken from the
released code (badripatro/svt), through notes on it: everything but the ideas. The paper's ablation
names a mixer by four letters, for tokens and channels of the low and of the high bands: T for
tensor blending, E for Einstein blending, X for none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.errors import unknown
from gatebook.layers.dtcwt import DTCWT
from gatebook.layers.spectral import FourierGate, PoolMixer, WaveletGate, in_float32
from gatebook.layers.vision import MLP, ConvBN, DepthwiseConv, DropPath, SelfAttention

Bands = tuple[Tensor, Tensor]  # real and imaginary parts, [B, C, 6, h/2, w/2] each


@dataclass(frozen=True, kw_only=True)
class SVTConfig:
    """Sizes of a Scattering Vision Transformer.

    Raises:
        ValueError: Sizes that do not fit: stages, image or heads; an unknown mixer.
    """

    stem: int  # channels of the stem's first three convolutions
    widths: tuple[int, ...]  # C of each stage
    depths: tuple[int, ...]  # blocks of each stage
    n_heads: tuple[int, ...]  # heads of each stage, where it has attention
    ratios: tuple[int, ...]  # hidden width of the FFN over C, each stage
    scatter_stages: int = 2  # alpha: how many stages, from the first, mix by `mixer`
    mixer: str = "ttee"  # of these stages, a key of `SPECTRAL_MIXERS`; attention in the others
    token_labels: bool = False  # second head on the tokens, as training on token labels needs it
    image_size: int = 224  # side of the square image, pixels
    stride: int = 4  # pixels a token of the first stage, 2 or 4
    in_channels: int = 3  # of the image
    n_classes: int = 1000  # of the head
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0

    def __post_init__(self):
        """Refuse what does not fit."""
        lengths = {len(x) for x in (self.widths, self.depths, self.n_heads, self.ratios)}
        if len(lengths) > 1:
            raise ValueError("widths, depths, n_heads and ratios must have one entry a stage")
        if not 0 <= self.scatter_stages <= len(self.depths):
            raise ValueError(
                f"scatter_stages={self.scatter_stages} must be 0 to {len(self.depths)}"
            )
        if self.mixer not in SPECTRAL_MIXERS:
            raise ValueError(unknown("mixer", self.mixer, SPECTRAL_MIXERS))
        if self.stride not in (2, 4):
            raise ValueError(f"stride is {self.stride}; it must be 2 or 4")
        step = self.stride * 2 ** (len(self.depths) - 1)
        if self.image_size % step:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {step}")

    def side(self, stage: int) -> int:
        """Side of a stage's map, tokens."""
        return self.image_size // (self.stride * 2**stage)


# ---------------------------------------------------------------- blending


def spectral(*shape: int) -> nn.Parameter:
    """Weights from 0.02 N(0, 1)."""
    return nn.Parameter(0.02 * torch.randn(shape))


def blockwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Complex block-diagonal layer `W^T x + b`, as one real product.

    Args:
        x: `[..., n, 2d, P]` for P places, d real parts above d imaginary ones.
        weight: Real and imaginary part, `[2, n, d, d]`.
        bias: Real and imaginary part, `[2, n, d]`.
    """
    real, imaginary = weight
    whole = torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)
    return whole.mT @ x + torch.cat([*bias], -1)[..., None]


class EinsteinBlend(nn.Module):
    """EBM: a complex MLP of two layers in each of n blocks, ReLU on both parts between.

    Args:
        n_blocks: Blocks n, each with weights of its own.
        width: Width d of a block.
    """

    def __init__(self, n_blocks: int, width: int):
        super().__init__()
        self.weights = nn.ParameterList(spectral(2, n_blocks, width, width) for _ in range(2))
        self.biases = nn.ParameterList(spectral(2, n_blocks, width) for _ in range(2))

    def blend(self, real: Tensor, imaginary: Tensor) -> Bands:
        """Blend the middle axis of `[..., n, d, P]`."""
        x = torch.cat([real, imaginary], -2)
        x = blockwise(x, self.weights[0], self.biases[0])
        return blockwise(F.relu(x), self.weights[1], self.biases[1]).chunk(2, -2)


class ChannelBlend(EinsteinBlend):
    """EBM over channels, in four blocks, shared by places and orientations.

    Args:
        d_model: Channels C.

    Raises:
        ValueError: Four does not divide C.
    """

    def __init__(self, d_model: int):
        if d_model % 4:
            raise ValueError(f"{d_model} channels do not form four blocks of one width")
        super().__init__(4, d_model // 4)

    def forward(self, real: Tensor, imaginary: Tensor) -> Bands:
        """Blend `[B, C, 6, h/2, w/2]`."""
        mixed = self.blend(*(x.flatten(2).unflatten(1, (4, -1)) for x in (real, imaginary)))
        return tuple(x.flatten(1, 2).unflatten(-1, real.shape[2:]) for x in mixed)


class RowBlend(EinsteinBlend):
    """EBM over the tokens of each row, with weights for each row: h/2 blocks of width w/2."""

    def forward(self, real: Tensor, imaginary: Tensor) -> Bands:
        """Blend `[B, C, 6, h/2, w/2]`."""
        mixed = self.blend(*(x.permute(3, 4, 0, 1, 2).flatten(2) for x in (real, imaginary)))
        return tuple(x.unflatten(-1, real.shape[:3]).permute(2, 3, 4, 0, 1) for x in mixed)


class TensorBlend(nn.Module):
    """TBM of the high bands: a complex factor for each coefficient, `[C, 6, h/2, w/2]`."""

    def __init__(self, d_model: int, height: int, width: int):
        super().__init__()
        self.weight = spectral(2, d_model, 6, height // 2, width // 2)

    def forward(self, real: Tensor, imaginary: Tensor) -> Bands:
        """Blend `[B, C, 6, h/2, w/2]`."""
        wr, wi = self.weight
        return real * wr - imaginary * wi, real * wi + imaginary * wr


class LowBlend(nn.Module):
    """EBM of the low band: over channels in four blocks, then along each row.

    The low band is real, and so are the weights: our reading of "EEEE".

    Args:
        d_model: Channels C, a multiple of 4.
        height: Rows h of the map.
        width: Columns w of the map.
    """

    def __init__(self, d_model: int, height: int, width: int):
        super().__init__()
        blocks = ((4, d_model // 4), (height, width))
        self.weights = nn.ParameterList(spectral(2, n, d, d) for n, d in blocks)
        self.biases = nn.ParameterList(spectral(2, n, d, 1) for n, d in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Blend `[B, C, h, w]`."""
        batch, c, height, width = x.shape
        x = self._mlp(0, x.flatten(2).unflatten(1, (4, -1))).flatten(1, 2)  # [B, C, h * w]
        x = x.unflatten(-1, (height, width)).permute(2, 3, 0, 1).flatten(2)  # [h, w, B * C]
        return self._mlp(1, x).unflatten(-1, (batch, c)).permute(2, 3, 0, 1)

    def _mlp(self, which: int, x: Tensor) -> Tensor:
        """Two layers with a ReLU between, of `[..., n, d, P]`."""
        (first, second), (b1, b2) = self.weights[which], self.biases[which]
        return second.mT @ F.relu(first.mT @ x + b1) + b2


# ---------------------------------------------------------------- mixers


class ScatterMixer(nn.Module):
    """Transform, blend each part, transform back.

    The low-pass map is multiplied by a tensor of its size, `[C, h, w]` (TBM); so the layer is
    bound to one resolution.

    Args:
        d_model: Channels C.
        height: Rows h of the map, even.
        width: Columns w of the map, even.
        high: What blends the high bands, one after the other.
        low: What blends the low-pass map in place of the tensor.
    """

    def __init__(
        self,
        d_model: int,
        height: int,
        width: int,
        *high: nn.Module,
        low: nn.Module | None = None,
    ):
        super().__init__()
        self.transform = DTCWT(height, width)
        self.low = spectral(d_model, height, width) if low is None else low
        self.high = nn.ModuleList(high)

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, h, w, C]`."""
        low, *bands = self.transform(x.permute(0, 3, 1, 2))
        for blend in self.high:
            bands = blend(*bands)
        low = self.low(low) if isinstance(self.low, nn.Module) else low * self.low
        return self.transform.inverse(low, *bands).permute(0, 2, 3, 1)


class SplitMixer(nn.Module):
    """TTEE: a depthwise 3 x 3 convolution on half of the channels, scattering on the other half.

    There Einstein blending works over channels, then along each row with weights for each row
    ("tokens"). The halves are interleaved channel by channel, the convolution's first.

    Args:
        d_model: Channels C.
        height: Rows h of the map, even.
        width: Columns w of the map, even.
        einstein_low: EEEE: the low-pass map is blended so, too.

    Raises:
        ValueError: Half of the channels do not form four blocks.
    """

    def __init__(self, d_model: int, height: int, width: int, einstein_low: bool = False):
        super().__init__()
        if d_model % 8:
            raise ValueError(f"d_model={d_model} must be a multiple of 8: two halves of 4 blocks")
        half = d_model // 2
        self.conv = DepthwiseConv(half, 3)
        high = ChannelBlend(half), RowBlend(height // 2, width // 2)
        low = LowBlend(half, height, width) if einstein_low else None
        self.scatter = ScatterMixer(half, height, width, *high, low=low)

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, h, w, C]`."""
        near, far = x.chunk(2, -1)
        return torch.stack([self.conv(near), self.scatter(far)], -1).flatten(-2)


class MapAttention(SelfAttention):
    """Softmax attention over all tokens of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, h, w, C]`."""
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


# Made from C, h and w. The first four are the paper's, the others controls.
SPECTRAL_MIXERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "ttee": SplitMixer,
    "ttxe": lambda c, h, w: ScatterMixer(c, h, w, ChannelBlend(c)),
    "tttt": lambda c, h, w: ScatterMixer(c, h, w, TensorBlend(c, h, w)),
    "eeee": lambda c, h, w: SplitMixer(c, h, w, einstein_low=True),
    "fourier": FourierGate,
    "wavelet": WaveletGate,
    "pool": lambda c, h, w: PoolMixer(c, 7),
    "conv": lambda c, h, w: DepthwiseConv(c, 7),
    "identity": lambda c, h, w: nn.Identity(),
}


# ---------------------------------------------------------------- network


class FFN(nn.Module):
    """Linear, depthwise 3 x 3 convolution over the map, GELU, Linear.

    Args:
        d_model: Channels C.
        hidden: Channels between.
        conv: Whether there is the convolution; without it each token is on its own.
    """

    def __init__(self, d_model: int, hidden: int, conv: bool = True):
        super().__init__()
        self.enter = nn.Linear(d_model, hidden)
        self.conv = DepthwiseConv(hidden, 3) if conv else None
        self.leave = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the same shape."""
        x = self.enter(x)
        if self.conv is not None:
            x = self.conv(x)
        return self.leave(F.gelu(x))


class Block(nn.Module):
    """x += mixer(LN(x)); x += FFN(LN(x)).

    Args:
        d_model: Channels C.
        mixer: Mixes maps `[B, h, w, C]`.
        hidden: Hidden width of the FFN.
        conv: Whether the FFN has its convolution.
        drop_path: Stochastic depth of both branches.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        hidden: int,
        conv: bool = True,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, eps=1e-6) for _ in range(2))
        self.mixer, self.ffn = mixer, FFN(d_model, hidden, conv)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the same shape."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class ClassBlock(nn.Module):
    """The class token reads all tokens, itself included, then an MLP changes it alone.

    Args:
        d_model: Channels C.
        n_heads: Heads.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, eps=1e-6) for _ in range(2))
        self.q, self.kv = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model)
        self.out, self.mlp = nn.Linear(d_model, d_model), MLP(d_model, 4 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, 1 + N, C]`, the class token first, to the new class token `[B, C]`."""
        y = self.norm1(x)
        k, v = self.kv(y).unflatten(-1, (2, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.q(y[:, :1]).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        token = x[:, :1] + self.out(read)
        return (token + self.mlp(self.norm2(token))).squeeze(1)


class Downsample(nn.Module):
    """A 3 x 3 convolution, then LayerNorm; halves a map where nothing else is said."""

    def __init__(self, in_channels: int, d_model: int, stride: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, d_model, 3, stride=stride, padding=1)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]`, channels first, to `[B, h, w, C]`, channels last."""
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class SVT(nn.Module):
    """Stem, stages with a convolution between them, class attention, head."""

    def __init__(self, config: SVTConfig):
        super().__init__()
        self.config, s = config, config.stem
        sizes = ((config.in_channels, 7, 2), (s, 3, 1), (s, 3, 1))
        stem = [(ConvBN(c, s, kernel, stride=step), nn.ReLU()) for c, kernel, step in sizes]
        self.stem = nn.Sequential(*(part for pair in stem for part in pair))
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        before = (s, *config.widths)
        self.enter, self.stages, self.norms = (nn.ModuleList() for _ in range(3))
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            self.enter.append(Downsample(before[stage], width, 2 if stage else config.stride // 2))
            blocks = [self._block(stage, rates.pop(0)) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            self.norms.append(nn.LayerNorm(width, eps=1e-6))
        self.class_block = ClassBlock(width, config.n_heads[-1])
        self.head = nn.Linear(width, config.n_classes)
        self.token_head = nn.Linear(width, config.n_classes) if config.token_labels else None
        self.apply(_initialise)

    def _block(self, stage: int, drop_path: float) -> Block:
        c, side = self.config, self.config.side(stage)
        width = c.widths[stage]
        if stage < c.scatter_stages:
            mixer = SPECTRAL_MIXERS[c.mixer](width, side, side)
        else:
            mixer = MapAttention(width, c.n_heads[stage])
        return Block(width, mixer, c.ratios[stage] * width, drop_path=drop_path)

    def features(self, images: Tensor) -> list[Tensor]:
        """Output of each stage, `[B, h, w, C]`, finest first; all but the last are normed.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        want = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if images.shape[1:] != want:
            raise ValueError(f"images of shape {list(images.shape)}; expected [B, *{want}]")
        x, maps = self.stem(images), []
        for stage, (enter, blocks) in enumerate(zip(self.enter, self.stages, strict=True)):
            x = blocks(enter(x.permute(0, 3, 1, 2) if stage else x))
            if stage < len(self.stages) - 1:
                x = self.norms[stage](x)
            maps.append(x)
        return maps

    def scores(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the class token, `[B, K]`, and of each token, `[B, N, K]`.

        The second is what token labels train; it is None without a second head.

        Args:
            images: `[B, c, H, W]`, normalised.
        """
        tokens = self.features(images)[-1].flatten(1, 2)
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        logits, norm = self.head(self.norms[-1](self.class_block(x))), self.norms[-1]
        return logits, self.token_head(norm(tokens)) if self.token_head is not None else None

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        With token labels, half of each class's highest score over the tokens is added at test. In
        training mode it is not: a loss on token labels takes both heads from `scores`.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, n_classes]`.
        """
        logits, tokens = self.scores(images)
        if tokens is not None and not self.training:
            logits = logits + 0.5 * tokens.amax(1)
        return logits


def _initialise(module: nn.Module) -> None:
    """Linear from N(0, 0.02^2), truncated; convolutions from N(0, 2 / fan-out); biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _published(
    stem: int, widths: tuple[int, ...], depths: tuple[int, ...], drop_path: float
) -> tuple[type, SVTConfig]:
    """A model of the main table, trained on token labels; 32 channels a head."""
    heads = tuple(width // 32 for width in widths)
    sizes = {"stem": stem, "widths": widths, "depths": depths, "n_heads": heads}
    more = {"ratios": (8, 8, 4, 4), "token_labels": True, "drop_path": drop_path}
    return SVT, SVTConfig(**sizes, **more)


MODELS: dict[str, tuple[type[nn.Module], SVTConfig]] = {
    "svt_h_s": _published(32, (64, 128, 320, 448), (3, 4, 6, 3), 0.1),
    "svt_h_b": _published(64, (64, 128, 320, 512), (3, 4, 12, 3), 0.1),
    "svt_h_l": _published(64, (96, 192, 384, 512), (3, 6, 18, 3), 0.3),
}
