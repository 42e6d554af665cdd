"""Parts shared by the vision backbones: windows, patches, stochastic depth.

Maps are channels-last, `[B, h, w, C]`; images are channels-first, `[B, c, H, W]`.
"""

from torch import Tensor, nn


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
    """

    def __init__(self, in_channels: int, d_model: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, d_model, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(d_model)

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
