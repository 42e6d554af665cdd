"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (arXiv 2401.16456).

Shapes:
    B    images              H, W  height and width of the image, pixels
    h    rows of positions   w     columns of positions     N   positions of a map, h * w
    C    channels            C_p   channels that attend     d   width of queries and keys, d_qk
    n    heads: 1 in the paper

Maps are channels-first, `[B, C, h, w]`. Taken from the released code (ysj9909/SHViT) where the
paper is silent or says otherwise: the norm is GroupNorm with one group, and ReLU stands before
the output projection.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gatebook.errors import unknown
from gatebook.layers.vision import ConvBN, fold_batch_norms

MIXING = ("softmax", "uniform", "own")  # see SHSA


@dataclass(frozen=True, kw_only=True)
class SHViTConfig:
    """Sizes of an SHViT.

    Raises:
        ValueError: Sizes that do not fit, or an unknown kind of block or of mixing.
    """

    widths: tuple[int, ...]  # C of each stage
    depths: tuple[int, ...]  # blocks of each stage
    partial: tuple[int, ...]  # C_p of each stage; unused where blocks have no attention
    kinds: str = "iss"  # a letter for each stage: blocks without (i) or with (s) attention
    qk_width: int = 16  # d of each head
    n_heads: tuple[int, ...] = (1, 1, 1)  # n of each stage; more than 1 is our control
    mixing: Literal["softmax", "uniform", "own"] = "softmax"  # see SHSA; the others are controls
    stem: tuple[int, ...] = (2, 2, 2, 2)  # stride of each 3x3 convolution of the stem
    image_size: int = 224  # side of the square image, pixels; the model takes any
    in_channels: int = 3  # channels of the image
    n_classes: int = 1000  # classes of the head

    def __post_init__(self):
        """Refuse what does not fit."""
        stages = len(self.widths)
        for name in ("depths", "partial", "kinds", "n_heads"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{stages} widths but {len(getattr(self, name))} {name}")
        for kind in self.kinds:
            if kind not in "is":
                raise ValueError(unknown("kind of block", kind, ("i", "s")))
        if self.mixing not in MIXING:
            raise ValueError(unknown("mixing", self.mixing, MIXING))
        if self.qk_width < 1 or min(self.n_heads) < 1:
            raise ValueError(
                f"qk_width and n_heads must be at least 1, got {self.qk_width} and {self.n_heads}"
            )
        if not self.stem or self.widths[0] % 2 ** (len(self.stem) - 1):
            raise ValueError(
                f"{len(self.stem)} convolutions of the stem do not double up to "
                f"{self.widths[0]} channels"
            )
        for stage, (c, c_p, heads) in enumerate(
            zip(self.widths, self.partial, self.n_heads, strict=True)
        ):
            if not 0 <= c_p <= c or c_p % heads:
                raise ValueError(
                    f"stage {stage + 1}: {c_p} of {c} channels attend in {heads} heads; choose "
                    f"from 0 to {c}, a multiple of the heads"
                )


class Stem(nn.Sequential):
    """Overlapping patches: 3x3 convolutions with ReLU between them (none after the last).

    The published stem has four of stride 2: a position for each 16x16 pixels.

    Args:
        in_channels: Channels of the image.
        d_model: Channels C of the first stage; each convolution doubles up to it.
        strides: Of each convolution.
    """

    def __init__(self, in_channels: int, d_model: int, strides: tuple[int, ...]):
        widths = [in_channels, *(d_model >> i for i in reversed(range(len(strides))))]
        parts: list[nn.Module] = []
        for i, stride in enumerate(strides):
            parts += [ConvBN(widths[i], widths[i + 1], 3, stride=stride), nn.ReLU()]
        super().__init__(*parts[:-1])


class Depthwise(nn.Module):
    """x += DWConvBN(x), 3x3.

    Args:
        d_model: Channels C.
        weight: First value of BatchNorm's factors; 0 starts the block as the identity.
    """

    def __init__(self, d_model: int, weight: float = 0.0):
        super().__init__()
        self.conv = ConvBN(d_model, d_model, 3, groups=d_model, weight=weight)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours, `[B, C, h, w]`."""
        return self.conv(x) if self.merged else x + self.conv(x)

    def merge(self) -> None:
        """Add the identity to the centre of the kernels, after BatchNorm was folded."""
        with torch.no_grad():
            self.conv.weight[:, 0, 1, 1] += 1
        self.merged = True


class SHSA(nn.Module):
    """Single-head self-attention on the first C_p channels (Eq. 1, with the code's order).

    `[q, k, v] = ConvBN(GroupNorm(x_a))`, `A = softmax(q^T k / sqrt(d))` over the keys, and
    `ConvBN(ReLU([v A^T, x_r]))`, where `x_a` are the first C_p channels and `x_r` the others,
    which are neither normed nor attended to. There is no position encoding.

    With C_p = C this is attention on all channels, with `n_heads` > 1 the multi-head control; with
    C_p = 0 only ReLU and projection are left. Two controls keep every parameter: `mixing` "uniform"
    reads all positions alike, A = 1/N, and "own" its own alone, A = 1.

    Args:
        d_model: Channels C.
        partial: Channels C_p that attend.
        qk_width: Width d of the queries and keys of a head.
        n_heads: Heads n, of C_p / n value channels each.
        mixing: What A is: "softmax", "uniform" or "own".
    """

    def __init__(
        self,
        d_model: int,
        partial: int,
        qk_width: int = 16,
        n_heads: int = 1,
        mixing: str = "softmax",
    ):
        super().__init__()
        self.partial, self.n_heads, self.qk_width = partial, n_heads, qk_width
        self.mixing = mixing
        if partial:
            self.norm = nn.GroupNorm(1, partial)  # over channels and positions together
            self.qkv = ConvBN(partial, 2 * n_heads * qk_width + partial)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(d_model, d_model, weight=0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, h, w]` to the residual branch of the same shape."""
        if not self.partial:
            return self.proj(x)
        x_a, x_r = x.split([self.partial, x.shape[1] - self.partial], dim=1)
        q, k, v = self._heads(x_a)
        y_a = v @ self.matrix(q, k).transpose(-1, -2)  # [B, n, C_p/n, N]
        return self.proj(torch.cat([y_a.reshape(x_a.shape), x_r], dim=1))

    def weights(self, x: Tensor) -> Tensor:
        """The attention of each head, `[B, n, N, N]`: row i holds the weights of i's keys."""
        q, k, _ = self._heads(x[:, : self.partial])
        return self.matrix(q, k)

    def _heads(self, x_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk = self.n_heads * self.qk_width
        parts = self.qkv(self.norm(x_a)).flatten(2).split([qk, qk, self.partial], dim=1)
        return tuple(part.unflatten(1, (self.n_heads, -1)) for part in parts)  # [B, n, d, N]

    def matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """Weights A `[B, n, N, N]` of queries and keys, both `[B, n, d, N]`."""
        if self.mixing == "uniform":
            return torch.ones_like(q.mT @ k) / q.shape[-1]
        if self.mixing == "own":
            return torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(
                *q.shape[:2], -1, -1
            )
        return (q.transpose(-1, -2) @ k * self.qk_width**-0.5).softmax(dim=-1)


class FFN(nn.Sequential):
    """1x1 convolutions C to 2C to C with ReLU between them.

    Args:
        d_model: Channels C.
    """

    def __init__(self, d_model: int):
        super().__init__(
            ConvBN(d_model, 2 * d_model), nn.ReLU(), ConvBN(2 * d_model, d_model, weight=0.0)
        )


class Block(nn.Module):
    """Three residual branches in sequence: depthwise convolution, attention (if any), FFN.

    Args:
        d_model: Channels C.
        attention: The second branch, or None.
        depthwise_weight: First factors of the depthwise convolution's BatchNorm.
    """

    def __init__(self, d_model: int, attention: SHSA | None = None, depthwise_weight: float = 0.0):
        super().__init__()
        self.depthwise = Depthwise(d_model, depthwise_weight)
        self.attention = attention
        self.ffn = FFN(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, h, w]` to the same shape."""
        x = self.depthwise(x)
        if self.attention is not None:
            x = x + self.attention(x)
        return x + self.ffn(x)


class SqueezeExcite(nn.Module):
    """Scale each channel by a sigmoid of a two-layer network of all channels' means.

    Args:
        d_model: Channels.
        hidden: Channels between.
    """

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(d_model, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, d_model, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale `[B, C, h, w]`."""
        return x * self.gate(x.mean((2, 3), keepdim=True))


class Downsampling(nn.Sequential):
    """Halve the map's sides: a block, patch merging from C to C', a block; none has attention.

    Merging widens to 4C, strides in a depthwise convolution, gates the channels and projects.

    Args:
        d_model: Channels C that come in.
        out: Channels C' that go out.
    """

    def __init__(self, d_model: int, out: int):
        wide, squeezed = 4 * d_model, max(8, (d_model + 4) // 8 * 8)
        super().__init__(
            Block(d_model, depthwise_weight=1.0),
            ConvBN(d_model, wide),
            nn.ReLU(),
            ConvBN(wide, wide, 3, stride=2, groups=wide),
            nn.ReLU(),
            SqueezeExcite(wide, squeezed),
            ConvBN(wide, out),
            Block(out, depthwise_weight=1.0),
        )


class SHViT(nn.Module):
    """The whole classifier: stem, stages with downsampling between, mean, BatchNorm, Linear."""

    def __init__(self, config: SHViTConfig):
        super().__init__()
        self.config, widths = config, config.widths
        self.stem = Stem(config.in_channels, widths[0], config.stem)
        self.stages = nn.ModuleList(self._stage(i) for i in range(len(widths)))
        self.downsampling = nn.ModuleList(map(Downsampling, widths[:-1], widths[1:]))
        self.norm = nn.BatchNorm1d(widths[-1])
        self.head = nn.Linear(widths[-1], config.n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _stage(self, i: int) -> nn.Sequential:
        c, width = self.config, self.config.widths[i]
        blocks = []
        for _ in range(c.depths[i]):
            attends = c.kinds[i] == "s"
            sizes = width, c.partial[i], c.qk_width, c.n_heads[i], c.mixing
            blocks.append(Block(width, SHSA(*sizes) if attends else None))
        return nn.Sequential(*blocks)

    def features(self, images: Tensor) -> list[Tensor]:
        """Output of each stage, `[B, C, h, w]`, finest first.

        Args:
            images: `[B, c, H, W]`, normalised.

        Raises:
            ValueError: The images have another number of channels than the configuration.
        """
        if images.dim() != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images of shape {list(images.shape)}; expected "
                f"[B, {self.config.in_channels}, H, W]"
            )
        maps, x = [], self.stem(images)
        for i, blocks in enumerate(self.stages):
            x = blocks(self.downsampling[i - 1](x) if i else x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Classify images `[B, c, H, W]`: logits `[B, n_classes]`.

        Raises:
            ValueError: As `features`, or training on one image, which leaves BatchNorm no variance.
        """
        if self.training and len(images) == 1:
            raise ValueError("one image has no batch statistics; train on two or more")
        return self.head(self.norm(self.features(images)[-1].mean((2, 3))))

    def fold(self) -> "SHViT":
        """Make it the network that the paper times, in place: no BatchNorm, no depthwise residual.

        The head's BatchNorm stays; it acts on one vector an image.

        Returns:
            The model, in evaluation mode.
        """
        fold_batch_norms(self)
        for module in self.modules():
            if isinstance(module, Depthwise) and not module.merged:
                module.merge()
        return self


def _published(
    widths: tuple[int, ...], depths: tuple[int, ...], partial: tuple[int, ...], **changes: int
) -> tuple[type[nn.Module], SHViTConfig]:
    return SHViT, SHViTConfig(widths=widths, depths=depths, partial=partial, **changes)


MODELS: dict[str, tuple[type[nn.Module], SHViTConfig]] = {
    "shvit_s1": _published((128, 224, 320), (2, 4, 5), (32, 48, 68)),
    "shvit_s2": _published((128, 308, 448), (2, 4, 5), (32, 66, 96)),
    "shvit_s3": _published((192, 352, 448), (3, 5, 5), (48, 75, 96)),
    "shvit_s4": _published((224, 336, 448), (4, 7, 6), (48, 72, 96), image_size=256),
}
