"""Augmentation of images: crops and flips, and the recipe of DeiT and Swin, which is `Mixing` too.

The recipe is RandAugment `m9-mstd0.5-inc1`, random erasing 0.25, mixup 0.8, cutmix 1.0 and label
smoothing 0.1; DeiT shows each image of an epoch three times (`repeats` of the batches). RandAugment
works on Pillow images in the loader's processes, because torchvision
is not among the dependencies; its operations and ranges follow the library that the recipe's
name comes from (timm), from memory, and were not compared with it. The rest works on tensors, on
the device.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Image, float, int], Image]  # image, strength in [0, 1], sign

FILL = (124, 116, 104)  # ImageNet's mean colour, where a moved image leaves a gap


def crop_flip(
    pixels: Tensor, padding: int, generator: torch.Generator, flips: bool = True
) -> Tensor:
    """Pad with zeros, crop back at a random place, flip left-right half of the time.

    Args:
        pixels: `[B, c, H, W]`, any type.
        padding: Zeros on each side, pixels.
        generator: Source of the places and flips, on the pixels' device.
        flips: Whether to flip.

    Returns:
        `[B, c, H, W]`.
    """
    n, _, height, width = pixels.shape
    device = pixels.device
    corner = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=device)
    flip = torch.randint(1 + flips, (n, 1), generator=generator, device=device).bool()
    rows = corner[0] + torch.arange(height, device=device)  # [B, H]
    across = torch.arange(width, device=device)
    columns = corner[1] + torch.where(flip, across.flip(0), across)  # [B, W]
    padded = F.pad(pixels, (padding,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(n, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class TrainTransform:
    """Random resized crop (area 8 to 100 %, aspect 3/4 to 4/3), flip, RandAugment.

    Args:
        size: Side S of the result, pixels.
        magnitude: Strength of RandAugment, of 10; 0 leaves it out.
    """

    def __init__(self, size: int, magnitude: float = 9.0):
        self.size, self.magnitude = size, magnitude

    def __call__(self, image: Image) -> Tensor:
        """Give uint8 pixels `[3, S, S]`; random numbers come from torch's global generator."""
        rng = random.Random(int(torch.randint(2**62, ())))
        box = random_box(*image.size, rng)
        image = image.resize((self.size, self.size), Pillow.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            image = image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(rand_augment(image, rng, self.magnitude) if self.magnitude else image)


class TestTransform:
    """Shorter side to S * 256 / 224, then the centre S x S; at 384 and above no crop.

    Args:
        size: Side S of the result, pixels.
    """

    __test__ = False  # not a pytest class

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image) -> Tensor:
        """Give uint8 pixels `[3, S, S]`."""
        width, height = image.size
        if self.size > 224:
            box = (0, 0, width, height)
        else:
            side = min(width, height) * 224 / 256
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        return to_tensor(image.resize((self.size,) * 2, Pillow.Resampling.BICUBIC, box=box))


def to_tensor(image: Image) -> Tensor:
    """Copy an RGB image into uint8 `[3, H, W]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def random_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Box of 8 to 100 % of the area with an aspect of 3/4 to 4/3; the centre after ten misses."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def rand_augment(
    image: Image, rng: random.Random, magnitude: float = 9.0, std: float = 0.5, layers: int = 2
) -> Image:
    """RandAugment (Cubuk et al., 2020), `inc1`: two random operations, each skipped half the time.

    Args:
        image: RGB.
        rng: Source of every choice.
        magnitude: Mean strength, 0 to 10.
        std: Standard deviation of the strength.
        layers: Operations drawn, with replacement.
    """
    names = sorted(OPERATIONS)
    for name in rng.choices(names, k=layers):
        if rng.random() < 0.5:
            strength = min(10.0, max(0.0, rng.gauss(magnitude, std))) / 10
            image = OPERATIONS[name](image, strength, rng.choice((-1, 1)))
    return image


def _affine(image: Image, *matrix: float) -> Image:
    kind = Pillow.Transform.AFFINE
    return image.transform(image.size, kind, matrix, Pillow.Resampling.BICUBIC, fillcolor=FILL)


def _enhance(kind: type) -> Operation:
    return lambda image, t, sign: kind(image).enhance(max(0.1, 1 + 0.9 * t * sign))


def _solarize_add(image: Image, t: float, _sign: int) -> Image:
    table = [min(255, i + int(110 * t)) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


OPERATIONS: dict[str, Operation] = {
    "auto contrast": lambda i, t, s: ImageOps.autocontrast(i),
    "equalize": lambda i, t, s: ImageOps.equalize(i),
    "invert": lambda i, t, s: ImageOps.invert(i),
    "rotate": lambda i, t, s: i.rotate(30 * t * s, Pillow.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": lambda i, t, s: ImageOps.posterize(i, max(1, 4 - int(4 * t))),
    "solarize": lambda i, t, s: ImageOps.solarize(i, 256 - int(256 * t)),
    "solarize add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear x": lambda i, t, s: _affine(i, 1, 0.3 * t * s, 0, 0, 1, 0),
    "shear y": lambda i, t, s: _affine(i, 1, 0, 0, 0.3 * t * s, 1, 0),
    "translate x": lambda i, t, s: _affine(i, 1, 0, 0.45 * t * s * i.width, 0, 1, 0),
    "translate y": lambda i, t, s: _affine(i, 1, 0, 0, 0, 1, 0.45 * t * s * i.height),
}


def random_erase(images: Tensor, generator: torch.Generator, rate: float = 0.25) -> Tensor:
    """Random erasing (Zhong et al., 2020): a box of normal noise in a quarter of the images.

    Args:
        images: `[B, c, H, W]`, normalised.
        generator: Source of the choices, on the CPU; the noise comes from torch's own generator.
        rate: Probability that an image gets a box of 2 to 33 % of its area, aspect 0.3 to 3.3.

    Returns:
        `[B, c, H, W]`, a copy.
    """
    n, _, height, width = images.shape
    images = images.clone()
    chosen, area, aspect, top, left = torch.rand(5, n, generator=generator).tolist()
    for i in range(n):
        if chosen[i] >= rate:
            continue
        pixels = height * width * (0.02 + (1 / 3 - 0.02) * area[i])
        ratio = 0.3 * (1 / 0.09) ** aspect[i]
        h = max(1, min(height, round((pixels * ratio) ** 0.5)))
        w = max(1, min(width, round((pixels / ratio) ** 0.5)))
        y, x = int(top[i] * (height - h + 1)), int(left[i] * (width - w + 1))
        images[i, :, y : y + h, x : x + w].normal_()
    return images


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What a recipe does to a whole batch: erasing, then mixup or cutmix, and smoothed targets.

    Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) is drawn for each batch. An image is
    mixed with the one at the mirrored place of the batch, with weight lambda from Beta(a, a), where
    a is `mixup` or `cutmix`; the targets likewise, after smoothing. Cutmix corrects lambda to the
    area that its box really covers.

    Raises:
        ValueError: A parameter that is no rate, or negative.
    """

    mixup: float = 0.8  # parameter of mixup's Beta distribution; 0 leaves it out
    cutmix: float = 1.0  # parameter of cutmix's Beta distribution; 0 leaves it out
    smoothing: float = 0.1  # probability spread evenly over all classes
    erase: float = 0.25  # share of the images of which a box is erased

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"mixup and cutmix are at least 0; got {self.mixup}, {self.cutmix}")
        if not (0 <= self.smoothing < 1 and 0 <= self.erase <= 1):
            raise ValueError(
                f"smoothing is in [0, 1) and erase in [0, 1]; got {self.smoothing}, {self.erase}"
            )

    def __call__(
        self, images: Tensor, labels: Tensor, n_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Erase and mix.

        Args:
            images: `[B, c, H, W]`, normalised.
            labels: `[B]`, class numbers.
            n_classes: Classes K.
            generator: Source of the choices, on the CPU.

        Returns:
            Images `[B, c, H, W]` and targets `[B, K]`, whose rows sum to 1.
        """
        if self.erase:
            images = random_erase(images, generator, self.erase)
        cut, weight = self._draw(generator)
        other = images.flip(0)
        if cut:
            images, weight = _paste(images, other, weight, generator)
        elif weight < 1:
            images = weight * images + (1 - weight) * other
        targets = F.one_hot(labels, n_classes).to(images.dtype) * (1 - self.smoothing)
        targets = targets + self.smoothing / n_classes
        return images, weight * targets + (1 - weight) * targets.flip(0)

    def _draw(self, generator: torch.Generator) -> tuple[bool, float]:
        """Whether to cut, and lambda."""
        if not (self.mixup or self.cutmix):
            return False, 1.0
        both = self.mixup and self.cutmix
        cut = bool(torch.rand((), generator=generator) < 0.5) if both else bool(self.cutmix)
        return cut, _beta(self.cutmix if cut else self.mixup, generator)


def _paste(
    images: Tensor, other: Tensor, weight: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Put a box of `other` into `images`; give the share that is left of `images` too."""
    height, width = images.shape[-2:]
    half = (1 - weight) ** 0.5 / 2
    centre = torch.rand(2, generator=generator).tolist()
    (top, bottom), (left, right) = (
        (max(0, round((c - half) * side)), min(side, round((c + half) * side)))
        for c, side in zip(centre, (height, width), strict=True)
    )
    images = images.clone()
    images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)


def _beta(a: float, generator: torch.Generator) -> float:
    """One number of Beta(a, a), from the CPU generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return random.Random(seed).betavariate(a, a)
