"""Images: a generated task, CIFAR-10 on the device, ImageNet-1K streamed from disk.

Batches are pairs `(images [B, c, H, W] float32, targets)`; the targets are class numbers `[B]`
or, after mixing, probabilities `[B, n_classes]`.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gatebook.data import augment, sources
from gatebook.data.sharded import Deal, ShardedBatches

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def straddle_xor(
    n: int, generator: torch.Generator, side: int = 4, noise: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Images whose label is the XOR of two bits on either side of the middle line.

    Two neighbouring pixels carry a marker (channel 0) and a fair bit as -1 or 1 (channel 1). They
    lie on both sides of the horizontal or the vertical middle, at a random place along it. Channel
    2 is Gaussian noise. The label is independent of either half of the image.

    Hence a model whose logit is a sum of a function of each half has no better cross-entropy than
    ln 2 (Jensen: the margin's mean is 0) and gets at most 3 of 4 bit pairs right.

    Args:
        n: Number of images.
        generator: Source of every random number.
        side: Side of the image, even.
        noise: Standard deviation of channel 2.

    Returns:
        Images `[n, 3, side, side]` and labels `[n]`, 0 or 1.
    """
    each = torch.arange(n)
    bits = torch.randint(2, (n, 2), generator=generator)
    along = torch.randint(side, (n,), generator=generator)
    vertical = torch.randint(2, (n,), generator=generator).bool()
    images = torch.zeros(n, 3, side, side)
    for k in range(2):
        across = torch.full((n,), side // 2 - 1 + k)
        row, column = torch.where(vertical, across, along), torch.where(vertical, along, across)
        images[each, 0, row, column] = 1
        images[each, 1, row, column] = 2.0 * bits[:, k] - 1
    images[:, 2] = noise * torch.randn(n, side, side, generator=generator)
    return images, bits.sum(1) % 2


@dataclass(frozen=True)
class Cifar:
    """A split of CIFAR-10 in memory: pixels `[n, 3, 32, 32]` uint8 and labels `[n]` int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def in_order(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Normalised batches without augmentation, the last one smaller; for scoring."""
        pairs = zip(self.pixels.split(batch_size), self.labels.split(batch_size), strict=True)
        return [(normalise(pixels, CIFAR10_MEAN, CIFAR10_STD), y) for pixels, y in pairs]


def cifar10(split: str, data_dir: str | Path = "", device: str = "cpu") -> Cifar:
    """CIFAR-10, decoded and moved to the device as a whole (184 MB for both splits).

    Args:
        split: `train` (50,000 images of 32x32) or `test` (10,000).
        data_dir: Local mirror, see `gatebook.data.sources`.
        device: Where the pixels go.

    Raises:
        DataUnavailableError: Neither the mirror nor the hub has it.
    """
    import datasets

    raw = datasets.Image(decode=False)  # Pillow frees the interpreter lock, so threads decode
    rows = sources.load("cifar10", split, data_dir).cast_column("img", raw)
    with ThreadPoolExecutor() as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_decode, rows["img"]))))
    labels = torch.tensor(rows["label"][:])
    return Cifar(pixels.permute(0, 3, 1, 2).contiguous().to(device), labels.to(device))


def _decode(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Map uint8 pixels `[B, c, H, W]` to float32 of mean 0 and deviation 1 in each channel."""
    shape = (1, -1, 1, 1)
    mean_c = torch.tensor(mean, device=pixels.device).view(shape)
    std_c = torch.tensor(std, device=pixels.device).view(shape)
    return (pixels.float() / 255 - mean_c) / std_c


class CifarBatches:
    """Shuffled, cropped, flipped and normalised batches, one epoch for each iteration.

    Everything happens on the data's device, from one generator there; the last, smaller batch
    of an epoch is dropped.

    Args:
        data: The training split.
        batch_size: Images in a batch, B.
        seed: Of the order and the augmentation.
        padding: Largest shift of the crop, pixels.

    Raises:
        ValueError: There are fewer images than one batch.
    """

    def __init__(self, data: Cifar, batch_size: int, seed: int, padding: int = 4):
        if len(data) < batch_size:
            raise ValueError(f"{len(data)} images are fewer than a batch of {batch_size}")
        self.data, self.batch_size, self.padding = data, batch_size, padding
        self.generator = torch.Generator(data.pixels.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.data.pixels.device
        order = torch.randperm(len(self.data), generator=self.generator, device=device)
        for batch in order.split(self.batch_size)[: len(self)]:
            pixels = augment.crop_flip(self.data.pixels[batch], self.padding, self.generator)
            yield normalise(pixels, CIFAR10_MEAN, CIFAR10_STD), self.data.labels[batch]

    def state_dict(self) -> dict[str, Tensor]:
        """Position of the generator; an epoch that was cut short starts anew on resume."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved position."""
        self.generator.set_state(state["generator"])


class _Decoded(Dataset):
    """ImageNet-1K as uint8 tensors `[3, S, S]` and class numbers; the worker decodes."""

    def __init__(self, split: str, transform: Any, data_dir: str | Path):
        import datasets

        rows = sources.load("imagenet-1k", split, data_dir)
        self.rows, self.transform = rows.cast_column("image", datasets.Image()), transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(row["image"].convert("RGB")), row["label"]


class ImageNetBatches:
    """ImageNet-1K as the Swin recipe trains on it: decode, augment, normalise, mix.

    Random resized crop, flip and RandAugment in the workers; normalisation, random erasing, mixup
    or cutmix and label smoothing on the device. Endless; every epoch shows each image once.

    Args:
        batch_size: Images in a batch of this process, B.
        image_size: Side S of the network's input, pixels.
        seed: Of the order and the augmentation.
        device: Where a batch goes.
        workers: Processes that decode.
        data_dir: Local mirror with the columns `image` and `label`.
        n_classes: Length of the mixed targets.
        parts: Batches for each optimiser step on this process.
        rank: Of this process.
        processes: How many share a step's images.

    Raises:
        DataUnavailableError: Neither the mirror nor the hub has it.
    """

    def __init__(
        self,
        batch_size: int,
        image_size: int,
        seed: int,
        *,
        device: str = "cpu",
        workers: int = 8,
        data_dir: str | Path = "",
        n_classes: int = 1000,
        parts: int = 1,
        rank: int = 0,
        processes: int = 1,
    ):
        rows = _Decoded("train", augment.TrainTransform(image_size), data_dir)
        step = batch_size * parts * processes
        deal = Deal(len(rows), step, seed, rank=rank, processes=processes)
        self.batches = ShardedBatches(rows, deal, parts=parts, workers=workers)
        self.seed, self.device, self.n_classes = seed, device, n_classes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images `[B, 3, S, S]` and probabilities `[B, n_classes]`."""
        deal = self.batches.deal
        for pixels, labels in self.batches:
            number = self.batches.position * deal.processes + deal.rank
            generator = torch.Generator().manual_seed(self.seed * 2**32 + number)
            pixels, labels = (t.to(self.device, non_blocking=True) for t in (pixels, labels))
            images = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)
            images = augment.random_erase(images, generator)
            yield augment.mix(images, labels, self.n_classes, generator)

    def state_dict(self) -> dict[str, int]:
        """The place in the data."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.batches.load_state_dict(state)

    merge_states = staticmethod(ShardedBatches.merge_states)


def imagenet_validation(
    batch_size: int,
    image_size: int,
    *,
    device: str = "cpu",
    workers: int = 8,
    data_dir: str | Path = "",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The validation images in order: shorter side to S * 256 / 224, centre crop of S.

    Args:
        batch_size: Images in a batch, B; the last one may hold fewer.
        image_size: Side S of the network's input, pixels.
        device: Where a batch goes.
        workers: Processes that decode.
        data_dir: Local mirror with the columns `image` and `label`.

    Yields:
        Images `[B, 3, S, S]` and class numbers `[B]`.

    Raises:
        DataUnavailableError: Neither the mirror nor the hub has it.
    """
    rows = _Decoded("validation", augment.TestTransform(image_size), data_dir)
    for pixels, labels in DataLoader(rows, batch_size, num_workers=workers):
        pixels, labels = (t.to(device, non_blocking=True) for t in (pixels, labels))
        yield normalise(pixels, IMAGENET_MEAN, IMAGENET_STD), labels
