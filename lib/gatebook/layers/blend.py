"""Tensor and Einstein blending of wavelet bands (SVT, arXiv 2311.01310).

Shapes:
    B   images               h, w   rows and columns of the map
    C   channels             6      oriented complex bands, of h/2 x w/2
    n   blocks               d      width of a block
    P   places
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Bands = tuple[Tensor, Tensor]  # real and imaginary parts, [B, C, 6, h/2, w/2] each


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
