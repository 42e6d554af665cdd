"""Token mixers to compare spectral ones with: gates on Fourier or Haar bands, and pooling.

Each takes and gives a channels-last map `[B, h, w, C]` of a fixed, even size, and computes in
float32 at least, whatever autocast asks for.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional as F

from gatebook.layers.dtcwt import check_map
from gatebook.layers.vision import MLP, DepthwiseConv


def in_float32(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Run a module's `forward` outside of autocast; 16-bit input becomes float32.

    The module then raises a TypeError if its own weights have 16 bits: the inverse of a transform
    in 16 bits no longer undoes it.
    """

    @wraps(forward)
    def wrapped(module: nn.Module, x: Tensor) -> Tensor:
        small = next((p.dtype for p in module.parameters() if p.dtype.itemsize < 4), None)
        if small is not None:
            raise TypeError(
                f"{type(module).__name__} computes in float32 or float64, its weights are {small}: "
                "keep the model in float32 and use torch.autocast for the other layers"
            )
        kind = x.device.type
        plain = (
            torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
        )
        with plain:
            return forward(module, x.to(torch.promote_types(x.dtype, torch.float32)))

    return wrapped


class FourierGate(nn.Module):
    """A learned complex factor for each frequency and channel (GFNet, arXiv 2107.00645).

    Args:
        d_model: Channels C.
        height: Rows h of the map.
        width: Columns w of the map, even.
    """

    def __init__(self, d_model: int, height: int, width: int):
        super().__init__()
        self.gate = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, d_model, 2))

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, h, w, C]`."""
        check_map(x, 1, self.gate.shape[0], 2 * self.gate.shape[1] - 2)
        spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        gated = spectrum * torch.view_as_complex(self.gate)
        return torch.fft.irfft2(gated, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def haar(x: Tensor) -> Tensor:
    """One level of the Haar transform: `[B, h, w, C]` to bands `[B, 4, h/2, w/2, C]`.

    Bands: mean, difference along the width, along the height, along both; each over 2, so that
    energy is kept.
    """
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h/2, 2, w/2, 2, C]
    x = torch.stack([x.sum(4), x[..., 0, :] - x[..., 1, :]], 1)  # [B, 2, h/2, 2, w/2, C]
    return torch.cat([x.sum(3), x[:, :, :, 0] - x[:, :, :, 1]], 1) / 2


def inverse_haar(bands: Tensor) -> Tensor:
    """Bands `[B, 4, h/2, w/2, C]` to the map `[B, h, w, C]` that `haar` split."""
    sums, differences = bands.chunk(2, 1)  # over the height
    rows = torch.stack([sums + differences, sums - differences], 3)  # [B, 2, h/2, 2, w/2, C]
    mean, across = rows.unbind(1)
    x = torch.stack([mean + across, mean - across], 4) / 2  # [B, h/2, 2, w/2, 2, C]
    return x.flatten(3, 4).flatten(1, 2)


class WaveletGate(nn.Module):
    """A learned real factor for each coefficient of a one-level Haar transform.

    Args:
        d_model: Channels C.
        height: Rows h of the map, even.
        width: Columns w of the map, even.
    """

    def __init__(self, d_model: int, height: int, width: int):
        super().__init__()
        self.gate = nn.Parameter(0.02 * torch.randn(4, height // 2, width // 2, d_model))

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, h, w, C]`."""
        check_map(x, 1, 2 * self.gate.shape[1], 2 * self.gate.shape[2])
        return inverse_haar(haar(x) * self.gate)


def shrink(x: Tensor) -> Tensor:
    """Mean of each 2 x 2 tokens: `[B, h, w, C]` to `[B, h/2, w/2, C]`."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def enlarge(x: Tensor) -> Tensor:
    """Repeat each token 2 x 2 times: `[B, h, w, C]` to `[B, 2h, 2w, C]`."""
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


class PoolMixer(nn.Module):
    """Average 2 x 2 tokens, mix the means with a depthwise convolution and an MLP, repeat.

    Args:
        d_model: Channels C, also the hidden width of the MLP.
        kernel_size: Side of the convolution, in means.
    """

    def __init__(self, d_model: int, kernel_size: int):
        super().__init__()
        self.conv, self.mlp = DepthwiseConv(d_model, kernel_size), MLP(d_model, d_model)

    @in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Mix `[B, h, w, C]`."""
        return enlarge(self.mlp(self.conv(shrink(x))))
