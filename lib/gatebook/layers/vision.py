"""Parts shared by the vision backbones: windows, patches, norms, attention, stochastic depth.

Maps are channels-last, `[B, h, w, C]`, where nothing else is said; images are channels-first,
`[B, c, H, W]`; tokens are `[B, N, C]`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.errors import unknown


def partition_windows(x: Tensor, window_size: int) -> Tensor:
    """Cut a map into windows that do not overlap.

    Args:
        x: Map `[B, h, w, C]`; `h` and `w` are multiples of the window's side.
        window_size: Side M of a window, in tokens.

    Returns:
        Windows `[B, nW, M * M, C]` in row-major order, their tokens too.

    Raises:
        ValueError: A side of the map is not a multiple of M.
    """
    h, w = x.shape[1:3]
    if h % window_size or w % window_size:
        raise ValueError(f"a map of {h}x{w} tokens has no whole windows of side {window_size}")
    x = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))  # [B, h/M, M, w/M, M, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, nW, M*M, C]


def merge_windows(windows: Tensor, window_size: int, height: int) -> Tensor:
    """Put windows back in their places: the inverse of `partition_windows`.

    Args:
        windows: `[B, nW, M * M, C]`.
        window_size: Side M of a window, in tokens.
        height: Height h of the map; its width follows from the number of windows.

    Returns:
        Map `[B, h, w, C]`.
    """
    rows = height // window_size
    x = windows.unflatten(2, (window_size, window_size)).unflatten(1, (rows, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, h, w, C]


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each: a strided convolution, then LayerNorm.

    Args:
        in_channels: Channels c of the image.
        d_model: Channels C of a token.
        patch_size: Side P of a patch, in pixels.
        norm: Whether LayerNorm follows.
    """

    def __init__(self, in_channels: int, d_model: int, patch_size: int, norm: bool = True):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, d_model, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(d_model) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map `[B, c, H, W]` to `[B, H/P, W/P, C]`."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drop a residual branch, a whole sample at a time.

    While training, a sample's branch is zero with probability `rate` and scaled by
    `1 / (1 - rate)` otherwise, so its expectation is unchanged. In evaluation it does nothing.

    Raises:
        ValueError: The rate is not in [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of dropped paths is {rate}; it must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Keep or drop each sample of `x`, `[B, ...]`."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        """Show the rate in the module's `repr`."""
        return f"rate={self.rate:g}"


class LayerScale(nn.Module):
    """One learned factor for each channel of a residual branch (Touvron et al., 2021).

    Args:
        d_model: Channels C.
        start: First value of every factor.
        dim: Axis of the channels: -1, or 1 for maps with channels first.
    """

    def __init__(self, d_model: int, start: float, dim: int = -1):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((d_model,), float(start)))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `x`."""
        return x * self.gamma if self.dim == -1 else x * self.gamma[:, None, None]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map `[B, C, h, w]`, at each position."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm `[B, C, h, w]`."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution with bias on a channels-last map, which keeps the map's size."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBN(nn.Sequential):
    """Convolution without bias that keeps the size (but for its stride), then BatchNorm.

    Maps are channels-first. `fold_batch_norms` makes it one convolution with bias.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        kernel_size: Side of the kernel, odd.
        stride: Of the convolution.
        groups: Of the convolution; `in_channels` for a depthwise one.
        weight: First value of BatchNorm's factors; 0 starts a residual branch as nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        weight: float = 1.0,
    ):
        sizes = {"stride": stride, "padding": kernel_size // 2, "groups": groups}
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **sizes)
        super().__init__(conv, nn.BatchNorm2d(out_channels))
        nn.init.constant_(self[1].weight, weight)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Replace every `ConvBN` below `model` by one convolution, for inference.

    Args:
        model: Changed in place, and put into evaluation mode.

    Returns:
        The model.
    """
    model.eval()
    for name, child in model.named_children():
        if isinstance(child, ConvBN):
            setattr(model, name, nn.utils.fuse_conv_bn_eval(child[0], child[1]))
        else:
            fold_batch_norms(child)
    return model


class MLP(nn.Sequential):
    """Linear, GELU, Linear over the last axis, each followed by dropout.

    Args:
        d_model: Channels that come in and go out.
        hidden: Channels between.
        dropout: Rate.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float = 0.0):
        parts = [nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model)]
        if dropout:
            parts = [*parts[:2], nn.Dropout(dropout), parts[2], nn.Dropout(dropout)]
        super().__init__(*parts)


class SelfAttention(nn.Module):
    """Multi-head softmax attention over all tokens (Vaswani et al., 2017), without positions.

    Args:
        d_model: Channels C.
        n_heads: Heads H.
        qkv_bias: Whether queries, keys and values have biases.
        d_head: Channels of a head; 0 is C / H.

    Raises:
        ValueError: The heads do not divide the channels, and their width is not given.
    """

    def __init__(self, d_model: int, n_heads: int, qkv_bias: bool = True, d_head: int = 0):
        super().__init__()
        if d_model % n_heads and not d_head:
            raise ValueError(f"n_heads={n_heads} must divide d_model={d_model}")
        self.n_heads = n_heads
        width = n_heads * (d_head or d_model // n_heads)
        self.qkv = nn.Linear(d_model, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[B, N, C]`."""
        q, k, v = self._heads(x)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """The attention of each head, `[B, H, N, N]`: row i holds the weights of token i's keys."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)


class Classifier(nn.Module):
    """The head: mean over positions, LayerNorm before or after it if wanted, Linear.

    Args:
        d_model: Channels C.
        n_classes: Classes K.
        norm: "before" the mean, "after" it, or "none".
        eps: Of LayerNorm.

    Raises:
        ValueError: An unknown place of the norm.
    """

    def __init__(self, d_model: int, n_classes: int, norm: str = "before", eps: float = 1e-5):
        super().__init__()
        if norm not in ("before", "after", "none"):
            raise ValueError(unknown("place of the norm", norm, ("before", "after", "none")))
        self.place = norm
        self.norm = nn.LayerNorm(d_model, eps=eps) if norm != "none" else nn.Identity()
        self.head = nn.Linear(d_model, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` or a channels-last map `[B, h, w, C]` to logits `[B, K]`."""
        x = self.norm(x) if self.place == "before" else x
        x = x.flatten(1, -2).mean(1)
        return self.head(self.norm(x) if self.place == "after" else x)
