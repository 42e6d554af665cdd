"""Faint gratings in strong, smooth clutter: the class is the orientation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ANGLES = (15, 45, 75, 105, 135, 165)  # of the stripes, degrees, counter-clockwise


def gratings(
    n: int,
    generator: torch.Generator,
    *,
    side: int = 32,
    amplitude: float = 0.3,
    period: float = 3.0,
    blur: float = 4.0,
    angles: Sequence[float] = ANGLES,
) -> tuple[Tensor, Tensor]:
    """Grey images of a sinusoidal grating over blurred noise of deviation 1.

    The phase is random, so no single pixel and no fixed template tells the class, and at periods
    far below `blur` the clutter has next to no energy where the grating lies. Noise is blurred on
    a torus of twice the side and cut out, so that an image does not wrap around.

    Args:
        n: Number of images.
        generator: Source of every random number.
        side: Side of the image, pixels.
        amplitude: Of the grating.
        period: Of the grating, pixels.
        blur: Standard deviation of the blur, pixels.
        angles: Of the stripes of each class, degrees.

    Returns:
        Images `[n, 1, side, side]` and classes `[n]`, places in `angles`.
    """
    labels = torch.randint(len(angles), (n,), generator=generator)
    phase = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    across = torch.tensor(angles, dtype=torch.float32)[labels].deg2rad() + math.pi / 2
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    along = across.cos()[:, None, None] * x - across.sin()[:, None, None] * y  # rows go down
    stripes = amplitude * torch.cos(2 * math.pi / period * along + phase)
    noise = torch.randn(n, 2 * side, 2 * side, generator=generator)
    frequency = 2 * math.pi * torch.fft.fftfreq(2 * side)
    keep = torch.exp(-((blur * frequency) ** 2) / 2)
    keep = keep[:, None] * keep
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * keep).real / keep.square().mean().sqrt()
    return (smooth[:, :side, :side] + stripes)[:, None], labels
