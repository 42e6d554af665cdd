"""HorNet: recursive gated convolutions (arXiv 2207.14284).

Shapes:
    B   images              H, W  height and width of a map, positions
    C   channels            n     order of a recursive gated convolution
    C_k channels of step k, C / 2^(n - 1 - k) for k = 0 .. n - 1, so that the last one is C
    m   channels that are mixed in space, the sum of all C_k, which is 2 C - C_0

The paper's body was not read. Taken from the released code (raoyongming/HorNet): the layers, their
order of channels, the macro design and the initialisation. Maps are channels-first, `[B, C, H, W]`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.errors import unknown
from gatebook.layers.vision import MLP, Classifier, DropPath, LayerNorm2d, LayerScale

EPS = 1e-6  # of every LayerNorm


@dataclass(frozen=True, kw_only=True)
class HorNetConfig:
    """Sizes of a HorNet.

    Raises:
        ValueError: Sizes that do not fit: stages, image, orders, widths or filters.
    """

    d_model: int  # C of the first stage; each later stage doubles it
    depths: tuple[int, ...] = (2, 3, 18, 2)  # blocks of each stage
    orders: tuple[int, ...] = (2, 3, 4, 5)  # n of each stage; 0 has no gate (our control)
    filters: tuple[Literal["conv", "global"], ...] = ("conv",) * 4  # spatial operator of each stage
    kernel_size: int = 7  # K of the depthwise convolution, odd
    scale: float = 1 / 3  # s, on the output of the spatial operator
    hidden_ratio: float = 4.0  # hidden channels of the MLP over C
    image_size: int = 224  # side of the square image, pixels; fixes the size of global filters
    patch_size: int = 4  # side of a patch, pixels
    in_channels: int = 3  # channels of the image
    n_classes: int = 1000  # classes of the head
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0
    layer_scale: float = 1e-6  # first value of the factors on both branches

    def __post_init__(self):
        """Refuse what the released code would round silently, or crash on."""
        stages = {len(self.depths), len(self.orders), len(self.filters)}
        if len(stages) > 1:
            raise ValueError(
                f"{len(self.depths)} depths, {len(self.orders)} orders and "
                f"{len(self.filters)} filters; there must be one of each for every stage"
            )
        step = self.patch_size * 2 ** (len(self.depths) - 1)
        if self.image_size % step:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {step}")
        _check_kernel(self.kernel_size)
        for stage, (order, kind) in enumerate(zip(self.orders, self.filters, strict=True)):
            mixed = sum(step_widths(self.stage_width(stage), order))
            if kind not in ("conv", "global"):
                raise ValueError(unknown("filter", kind, ("conv", "global")))
            if kind == "global":
                _check_halves(mixed)

    def stage_side(self, stage: int) -> int:
        """Side of the stage's map: `image_size / (patch_size * 2^stage)`."""
        return self.image_size // (self.patch_size * 2**stage)

    def stage_width(self, stage: int) -> int:
        """Channels of the stage: `C * 2^stage`."""
        return self.d_model * 2**stage


def step_widths(d_model: int, order: int) -> list[int]:
    """Channels of each step of the recursion, `C_k = C / 2^(n - 1 - k)`; `[C]` for orders 0 and 1.

    Raises:
        ValueError: The order is negative, or too high for the channels to be halved so often.
    """
    if order < 0:
        raise ValueError(f"order {order} is negative; 0 is a convolution without gates")
    steps = max(order, 1)
    if d_model % 2 ** (steps - 1):
        raise ValueError(
            f"order {order} needs a multiple of {2 ** (steps - 1)} channels, got {d_model}"
        )
    return [d_model // 2 ** (steps - 1 - k) for k in range(steps)]


def _check_kernel(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size {size}: it must be odd and at least 1")


def _check_halves(channels: int) -> None:
    if channels % 2:
        raise ValueError(f"a global filter halves its channels; {channels} is odd")


class GlobalFilter(nn.Module):
    """The spatial operator of the variant "GF": half of the channels see 3x3, half see all.

    LayerNorm; the first half of the channels goes through a depthwise 3x3 convolution, the second
    half is multiplied by learned numbers in the frequency domain, which is a circular convolution
    as large as the map; the halves are interleaved channel by channel; LayerNorm.

    Args:
        channels: m, even.
        height: Rows of the map that the filter is made for.
        width: Columns of that map. On a map of another size the filter is interpolated.

    Raises:
        ValueError: An odd number of channels.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        _check_halves(channels)
        half = channels // 2
        self.norm_in = LayerNorm2d(channels, eps=EPS)
        self.local = nn.Conv2d(half, half, 3, padding=1, bias=False, groups=half)
        self.weight = nn.Parameter(torch.empty(half, height, width // 2 + 1, 2))  # real, imaginary
        self.norm_out = LayerNorm2d(channels, eps=EPS)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, m, H, W]` in space."""
        local, whole = self.norm_in(x).chunk(2, dim=1)
        both = torch.stack([self.local(local), self.filter(whole).to(x.dtype)], dim=2)
        return self.norm_out(both.flatten(1, 2))  # local 0, whole 0, local 1, whole 1, ...

    def filter(self, x: Tensor) -> Tensor:
        """Multiply the spectrum of `[B, m/2, H, W]`, in at least 32 bits."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.rfft2(x, norm="ortho")
        spectrum = spectrum * self.frequencies(*spectrum.shape[-2:])
        return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")

    def frequencies(self, rows: int, columns: int) -> Tensor:
        """The learned numbers, complex `[m/2, rows, columns]`, resized bilinearly if need be."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if weight.shape[1:3] != (rows, columns):
            weight = F.interpolate(
                weight.movedim(-1, 0), (rows, columns), mode="bilinear", align_corners=True
            ).movedim(0, -1)
        return torch.view_as_complex(weight.contiguous())


class RecursiveGatedConv(nn.Module):
    """`g^n Conv`: n gates, each a spatially mixed linear map of the input.

    The first projection splits into `p_0` and `q_0 .. q_(n-1)`. With `f` the spatial operator:

        p_1 = s f(q_0) * p_0,   p_(k+1) = s f(q_k) * g_k(p_k),   y = phi_out(p_n).

    Nothing but products makes it non-linear: no activation, no norm. Each step adds one degree, so
    the output is a polynomial of degree n + 1 of the input.

    Args:
        d_model: Channels C.
        order: Number of gates n. Order 0, our control, is `phi_out(s f(phi_in(x)))`, all C wide.
        kernel_size: Side of the depthwise convolution, odd.
        scale: s.
        spectrum: Height and width of the map for a global filter in place of the convolution.
        padding_mode: Of the convolution: "zeros" or "circular".

    Raises:
        ValueError: The channels cannot be halved `order - 1` times; or an even kernel.
    """

    def __init__(
        self,
        d_model: int,
        order: int,
        kernel_size: int = 7,
        scale: float = 1 / 3,
        spectrum: tuple[int, int] | None = None,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        _check_kernel(kernel_size)
        self.widths = step_widths(d_model, order)
        self.order, self.scale = order, scale
        mixed = sum(self.widths)  # m
        self.proj_in = nn.Conv2d(d_model, mixed + (self.widths[0] if order else 0), 1)
        if spectrum is None:
            sizes = {"padding": kernel_size // 2, "padding_mode": padding_mode, "groups": mixed}
            self.spatial = nn.Conv2d(mixed, mixed, kernel_size, **sizes)
        else:
            self.spatial = GlobalFilter(mixed, *spectrum)
        steps = zip(self.widths[:-1], self.widths[1:], strict=True)
        self.grow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in steps)  # g_1 .. g_(n-1)
        self.proj_out = nn.Conv2d(d_model, d_model, 1)

    def gates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`p_0`, `[B, C_0, H, W]` (without channels for order 0), and every `s f(q_k)`.

        In at least 32 bits: products of n + 1 factors lose digits in fewer.
        """
        p, q = self.proj_in(x).split([self.widths[0] if self.order else 0, sum(self.widths)], dim=1)
        p, q = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (p, self.spatial(q)))
        return p, list((self.scale * q).split(self.widths, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, C, H, W]`."""
        p, (first, *rest) = self.gates(x)
        p = first * p if self.order else first
        for gate, grow in zip(rest, self.grow, strict=True):
            p = gate * grow(p.to(x.dtype))
        return self.proj_out(p.to(x.dtype))


class HorNetBlock(nn.Module):
    """x += gamma_1 g^n Conv(LN(x)); x += gamma_2 MLP(LN(x)).

    Args:
        d_model: Channels C.
        mixer: Mixes maps `[B, C, H, W]` in space.
        hidden: Hidden width of the MLP.
        drop_path: Stochastic depth of both branches.
        layer_scale: First value of gamma_1 and gamma_2.
    """

    def __init__(
        self, d_model: int, mixer: nn.Module, hidden: int, drop_path: float, layer_scale: float
    ):
        super().__init__()
        self.norm1 = LayerNorm2d(d_model, eps=EPS)
        self.mixer = mixer
        self.scale1 = LayerScale(d_model, layer_scale, dim=1)
        self.norm2 = nn.LayerNorm(d_model, eps=EPS)
        self.mlp = MLP(d_model, hidden)
        self.scale2 = LayerScale(d_model, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        channels = self.scale2(self.mlp(self.norm2(x.movedim(1, -1))))  # [B, H, W, C]
        return x + self.drop_path(channels.movedim(-1, 1))


class HorNet(nn.Module):
    """The whole classifier: patches, stages with 2x2 convolutions between, mean, norm, head."""

    def __init__(self, config: HorNetConfig):
        super().__init__()
        self.config = c = config
        widths = [c.stage_width(stage) for stage in range(len(c.depths))]
        stem = nn.Conv2d(c.in_channels, widths[0], c.patch_size, stride=c.patch_size)
        self.downsample = nn.ModuleList([nn.Sequential(stem, LayerNorm2d(widths[0], eps=EPS))])
        for width in widths[:-1]:
            merge = nn.Conv2d(width, 2 * width, 2, stride=2)
            self.downsample.append(nn.Sequential(LayerNorm2d(width, eps=EPS), merge))
        rates = torch.linspace(0, c.drop_path, sum(c.depths), device="cpu").tolist()
        self.stages = nn.ModuleList(
            nn.Sequential(*(self._block(stage, rates.pop(0)) for _ in range(depth)))
            for stage, depth in enumerate(c.depths)
        )
        self.classifier = Classifier(widths[-1], c.n_classes, "after", EPS)
        self.apply(_initialise)

    def _block(self, stage: int, drop_path: float) -> HorNetBlock:
        c, width, side = self.config, self.config.stage_width(stage), self.config.stage_side(stage)
        spectrum = (side, side) if c.filters[stage] == "global" else None
        mixer = RecursiveGatedConv(width, c.orders[stage], c.kernel_size, c.scale, spectrum)
        return HorNetBlock(width, mixer, round(c.hidden_ratio * width), drop_path, c.layer_scale)

    def features(self, images: Tensor) -> list[Tensor]:
        """Output of each stage, `[B, C, H, W]`, finest first.

        Raises:
            ValueError: The images have other channels, or a side that cannot be halved to the end.
        """
        step = self.config.patch_size * 2 ** (len(self.stages) - 1)
        if images.shape[1] != self.config.in_channels or any(n % step for n in images.shape[2:]):
            raise ValueError(
                f"images of shape {list(images.shape)}; expected [B, {self.config.in_channels}, H, "
                f"W] with sides that are multiples of {step}"
            )
        maps, x = [], images
        for downsample, blocks in zip(self.downsample, self.stages, strict=True):
            x = blocks(downsample(x))
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, n_classes]`.
        """
        return self.classifier(self.features(images)[-1].movedim(1, -1))


def _initialise(module: nn.Module) -> None:
    """Weights of convolutions and Linear from N(0, 0.02^2), biases 0 (released code)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _published(d_model: int, drop_path: float) -> dict[str, tuple[type[nn.Module], HorNetConfig]]:
    """A size with 7x7 convolutions throughout, and with global filters in the last two stages."""
    return {
        suffix: (HorNet, HorNetConfig(d_model=d_model, drop_path=drop_path, filters=filters))
        for suffix, filters in {
            "": ("conv",) * 4,
            "_gf": ("conv", "conv", "global", "global"),
        }.items()
    }


# Stochastic depth of L is not known to us; 0.5, that of B, is our choice.
MODELS: dict[str, tuple[type[nn.Module], HorNetConfig]] = {
    f"hornet_{size}{suffix}": entry
    for size, d_model, rate in (("t", 64, 0.2), ("s", 96, 0.4), ("b", 128, 0.5), ("l", 192, 0.5))
    for suffix, entry in _published(d_model, rate).items()
}
