"""ViG: linear-complexity visual sequence learning with gated linear attention (arXiv 2405.18425).

Shapes:
    B   images             h, w  rows and columns of tokens    N    tokens, h * w, row by row
    D   channels           H     heads                         F    hidden width of SwiGLU
    K   key channels of a head, D / 2H                         V    value channels of a head, D / H
    R   rank of the gates' map, 16

The paper's text was not read. The layer, its initialisation and the configurations follow a
description of the released code (hustvl/ViG). The hierarchical variants are not built.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.errors import unknown
from gatebook.kernels import bidirectional_gla, gla, softmax_attention
from gatebook.layers.language import RMSNorm, SwiGLU, llama_width
from gatebook.layers.vision import Classifier, DropPath, LayerNorm2d

GATE_RANK = 16  # R
TEMPERATURE = 16  # log-gates are log-sigmoids divided by this
GAIN = 2**-2.5  # of the Xavier initialisation inside the mixer
NORM_EPS = 1e-6  # of a block's RMSNorms
GATES = {"direction_wise": 2, "shared": 1, "forward": 1, "softmax": 0}  # gates of a key channel
LOCAL = ("injected", "convolution", "none")


@dataclass(frozen=True, kw_only=True)
class ViGConfig:
    """Sizes and choices of a ViG.

    Raises:
        ValueError: Heads that do not divide the channels, or an unknown choice.
    """

    d_model: int  # D
    n_heads: int  # H
    depth: int = 12  # blocks
    hidden: int = 0  # F; 0 is LLaMA's width, 256 * ceil(8 D / 768)
    conv_silu: bool = False  # SiLU after the depthwise convolution (T only)
    out_silu: bool = False  # SiLU before the output projection (T only)
    gates: Literal["direction_wise", "shared", "forward", "softmax"] = "direction_wise"  # see BiGLA
    local: Literal["injected", "convolution", "none"] = "injected"  # see BiGLA
    image_size: int = 224  # side of the square image, pixels
    strides: tuple[int, int] = (8, 2)  # of the stem's convolutions
    in_channels: int = 3  # channels of the image
    n_classes: int = 1000  # classes of the head
    positions: bool = True  # learned, added to the tokens
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0
    mixer_eps: float = 1e-6  # epsilon of the two RMSNorms over a head's channels

    def __post_init__(self):
        """Refuse what does not fit."""
        if self.n_heads < 1 or self.d_model < 1 or self.d_model % (2 * self.n_heads):
            raise ValueError(
                "d_model must be a multiple of 2 n_heads, both at least 1, got "
                f"{self.d_model} and {self.n_heads}"
            )
        if self.mixer_eps <= 0:
            raise ValueError(f"mixer_eps must be above 0, got {self.mixer_eps}")
        for kind, value, allowed in (("gates", self.gates, GATES), ("local", self.local, LOCAL)):
            if value not in allowed:
                raise ValueError(unknown(kind, value, allowed))
        self.side(self.image_size)

    def side(self, pixels: int) -> int:
        """Tokens along a side of an image; both convolutions of the stem pad by 1.

        Raises:
            ValueError: The side is too short for one token.
        """
        first, second = self.strides
        if pixels < first - 1:
            raise ValueError(
                f"{pixels} pixels leave no token at strides {self.strides}; "
                f"give {first - 1} or more"
            )
        return ((pixels + 1 - first) // first) // second + 1


class Stem(nn.Sequential):
    """Two convolutions, each with a LayerNorm over channels, SiLU between: a map of tokens.

    At strides (8, 2) the kernels are 9 and 3. For small images the first kernel shrinks with its
    stride s to s + 1, which is our choice.
    """

    def __init__(self, config: ViGConfig):
        d, (first, second) = config.d_model, config.strides
        super().__init__(
            nn.Conv2d(config.in_channels, d // 2, first + 1, stride=first, padding=1),
            LayerNorm2d(d // 2),
            nn.SiLU(),
            nn.Conv2d(d // 2, d, 3, stride=second, padding=1),
            LayerNorm2d(d),
        )

    def forward(self, images: Tensor) -> Tensor:
        """`[B, c, H, W]` to a channels-last map `[B, h, w, D]`."""
        return super().forward(images).movedim(1, -1)


class BiGLA(nn.Module):
    """Bidirectional gated linear attention with 2-D gating locality injection.

    1. u = the input after a depthwise 3 x 3 convolution, and SiLU in ViG-T. All else reads u.
    2. q, k, v = maps of u, of widths D/2, D/2 and D.
    3. log-gates = log sigmoid(W_2 W_1 u + b) / 16, for each key channel and each direction.
    4. o = mean of a scan from the first token and one from the last; a token counts itself once.
    5. y = g * RMS(o) + (1 - g) * RMS(u) with g = sigmoid(W_g u + b_g), RMS over a head's channels.
    6. The output is W_o y, of SiLU(y) in ViG-T.

    Controls, by `config.gates`: "shared" uses one gate in both directions, "forward" scans from
    the first token only, "softmax" puts softmax attention in place of the scans. By
    `config.local`: "convolution" leaves out step 5 (y = RMS(o)), "none" step 1 as well (u is the
    input).
    """

    def __init__(self, config: ViGConfig):
        super().__init__()
        d, n_gates = config.d_model, GATES[config.gates]
        d_value = d // config.n_heads
        self.config = config
        if config.local != "none":
            self.conv = nn.Conv2d(d, d, 3, padding=1, groups=d, bias=False)
        self.qkv = nn.Linear(d, 2 * d, bias=False)
        if n_gates:
            low = nn.Linear(d, GATE_RANK, bias=False)
            self.gate = nn.Sequential(low, nn.Linear(GATE_RANK, n_gates * d // 2))
        self.norm_global = RMSNorm(d_value, eps=config.mixer_eps)
        if config.local == "injected":
            self.mix = nn.Linear(d, d)
            self.norm_local = RMSNorm(d_value, eps=config.mixer_eps)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map `[B, h, w, D]`."""
        u = self.features(x)
        y = self.inject(u, self.scan(u)).flatten(2)  # (B, N, D)
        y = F.silu(y) if self.config.out_silu else y
        return self.out(y).unflatten(1, x.shape[1:3])

    def features(self, x: Tensor) -> Tensor:
        """The local path u `[B, N, D]` of a map `[B, h, w, D]`."""
        if self.config.local != "none":
            x = self.conv(x.movedim(-1, 1)).movedim(1, -1)
            x = F.silu(x) if self.config.conv_silu else x
        return x.flatten(1, 2)

    def log_gates(self, u: Tensor) -> list[Tensor]:
        """Log-gates `[B, N, H, K]` of each direction in float32 (float64 for such an input)."""
        z = self.gate(u)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        log_alpha = F.logsigmoid(z) / TEMPERATURE
        n_gates, heads = GATES[self.config.gates], self.config.n_heads
        return list(log_alpha.unflatten(-1, (n_gates, heads, -1)).unbind(2))

    def scan(self, u: Tensor) -> Tensor:
        """The global path o `[B, N, H, V]` of u `[B, N, D]`."""
        heads, half = self.config.n_heads, self.config.d_model // 2
        q, k, v = (
            part.unflatten(-1, (heads, -1))
            for part in self.qkv(u).split([half, half, 2 * half], -1)
        )
        if self.config.gates == "softmax":
            return softmax_attention(q, k, v)
        gates = self.log_gates(u)
        if self.config.gates == "forward":
            return gla(q, k, v, *gates)[0]
        return bidirectional_gla(q, k, v, gates[0], gates[-1])

    def share(self, u: Tensor) -> Tensor:
        """The gate g `[B, N, H, V]`: how much of each channel is global, in [0, 1]."""
        return self.mix(u).sigmoid().unflatten(-1, (self.config.n_heads, -1))

    def inject(self, u: Tensor, o: Tensor) -> Tensor:
        """y `[B, N, H, V]`: the gated mean of global o `[B, N, H, V]` and local u `[B, N, D]`."""
        o = self.norm_global(o)
        if self.config.local != "injected":
            return o
        local = self.norm_local(u.unflatten(-1, (self.config.n_heads, -1)))
        return torch.lerp(local, o, self.share(u))


class ViGBlock(nn.Module):
    """x += BiGLA(RMS(x)); x += SwiGLU(RMS(x)).

    Args:
        config: Of the model.
        drop_path: Stochastic depth of both branches.
    """

    def __init__(self, config: ViGConfig, drop_path: float = 0.0):
        super().__init__()
        d = config.d_model
        self.norm1 = RMSNorm(d, eps=NORM_EPS)
        self.mixer = BiGLA(config)
        self.norm2 = RMSNorm(d, eps=NORM_EPS)
        self.ffn = SwiGLU(d, config.hidden or llama_width(d))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map `[B, h, w, D]`."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


def _blocks(config: ViGConfig) -> nn.Sequential:
    rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
    return nn.Sequential(*(ViGBlock(config, rate) for rate in rates))


def _initialise(module: nn.Module) -> None:
    """Linear weights from N(0, 0.02^2); Xavier with a small gain inside a mixer; biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, BiGLA):  # after its own Linears
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(part.weight, gain=GAIN)


class ViG(nn.Module):
    """The classifier: stem, positions, blocks, RMSNorm, mean over tokens, head."""

    def __init__(self, config: ViGConfig):
        super().__init__()
        self.config, d = config, config.d_model
        self.embed = Stem(config)
        n_tokens = config.side(config.image_size) ** 2
        self.positions = nn.Parameter(torch.zeros(1, n_tokens, d)) if config.positions else None
        self.blocks = _blocks(config)
        self.norm = RMSNorm(d, eps=NORM_EPS)
        self.classifier = Classifier(d, config.n_classes, norm="none")
        self.apply(_initialise)
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)

    def tokens(self, images: Tensor) -> Tensor:
        """The map `[B, h, w, D]` that enters the first block; any size of image.

        Positions are resized bicubically where the image has another size than the configuration's.

        Raises:
            ValueError: The images have another number of channels, or leave no token.
        """
        channels = self.config.in_channels
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images of shape {list(images.shape)}; expected [B, {channels}, H, W]"
            )
        size = [self.config.side(pixels) for pixels in images.shape[2:]]
        x = self.embed(images)
        if self.positions is None:
            return x
        own = math.isqrt(self.positions.shape[1])
        table = self.positions.unflatten(1, (own, own))  # (1, h, w, D)
        if size != [own, own]:
            table = F.interpolate(table.movedim(-1, 1), size, mode="bicubic").movedim(1, -1)
        return x + table

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, n_classes]`.
        """
        return self.classifier(self.norm(self.blocks(self.tokens(images))))

    def recurrence_macs(self, image_size: int) -> int:
        """Multiply-adds of the scans on one image: k v^T and q S in each direction.

        A count of the model that runs sees the chunked form's products instead.
        """
        c = self.config
        products = c.side(image_size) ** 2 * (c.d_model // 2) * (c.d_model // c.n_heads)
        directions = {"softmax": 0, "forward": 1}.get(c.gates, 2)
        return c.depth * directions * 2 * products

    def no_weight_decay(self) -> set[str]:
        """The positions, as in DeiT's recipe."""
        return {"positions"} if self.positions is not None else set()


class ViGTagger(nn.Module):
    """ViG's blocks on a map of given tokens, with a prediction at each; for generated tasks.

    Args:
        config: Of the blocks; `in_channels` are those of a token. `image_size` and `strides` have
            no effect.
        grid: Rows and columns of the map.
    """

    def __init__(self, config: ViGConfig, grid: tuple[int, int]):
        super().__init__()
        d = config.d_model
        self.embed = nn.Linear(config.in_channels, d)
        self.positions = nn.Parameter(torch.zeros(1, *grid, d)) if config.positions else None
        self.blocks = _blocks(config)
        self.norm = RMSNorm(d, eps=NORM_EPS)
        self.head = nn.Linear(d, config.n_classes)
        self.apply(_initialise)
        nn.init.normal_(self.embed.weight)  # tokens are few and one-hot
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)

    def tokens(self, x: Tensor) -> Tensor:
        """The map `[B, h, w, D]` that enters the first block."""
        x = self.embed(x)
        return x if self.positions is None else x + self.positions

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, h, w, c]` to logits `[B, h, w, n_classes]`."""
        return self.head(self.norm(self.blocks(self.tokens(x))))


# The released configuration files; drop path of the recipe.
MODELS: dict[str, tuple[type[nn.Module], ViGConfig]] = {
    "vig_t": (ViG, ViGConfig(d_model=192, n_heads=3, conv_silu=True, out_silu=True)),
    "vig_s": (ViG, ViGConfig(d_model=384, n_heads=6, drop_path=0.2)),
    "vig_b": (ViG, ViGConfig(d_model=768, n_heads=12, drop_path=0.5)),
}
