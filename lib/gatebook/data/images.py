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
from gatebook.errors import unknown

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Here and not in `sources`, so that evidence on texts does not depend on them.
sources.DATASETS |= {
    "cifar100": sources.Source(
        hub_id="uoft-cs/cifar100",
        revision="main",
        columns=("img", "fine_label"),
        download="142 MB",
    ),
    "mini-imagenet": sources.Source(
        hub_id="timm/mini-imagenet",
        revision="main",
        columns=("image", "label"),
        download="3 GB",
        splits=("train", "validation", "test"),
        note="100 classes; papers differ in their splits",
    ),
}


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
    """A split of CIFAR-10 or CIFAR-100, or of pictures like theirs, in memory.

    Pixels are `[n, 3, 32, 32]` uint8, labels `[n]` int64.
    """

    pixels: Tensor
    labels: Tensor
    n_classes: int = 10
    flips: bool = True  # whether a mirrored picture keeps its class

    def __len__(self) -> int:
        return len(self.labels)

    def in_order(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Normalised batches without augmentation, the last one smaller; for scoring."""
        pairs = zip(self.pixels.split(batch_size), self.labels.split(batch_size), strict=True)
        return [(normalise(pixels, CIFAR10_MEAN, CIFAR10_STD), y) for pixels, y in pairs]


def cifar10(
    split: str, data_dir: str | Path = "", device: str = "cpu", corpus: str = "cifar10"
) -> Cifar:
    """CIFAR-10 or CIFAR-100, decoded and moved to the device as a whole (184 MB for both splits).

    Args:
        split: `train` (50,000 images of 32x32) or `test` (10,000).
        data_dir: Local mirror, see `gatebook.data.sources`.
        device: Where the pixels go.
        corpus: `cifar10` or `cifar100`.

    Raises:
        ValueError: Another corpus.
        DataUnavailableError: Neither the mirror nor the hub has it.
    """
    if corpus not in ("cifar10", "cifar100"):
        raise ValueError(unknown("corpus", corpus, ("cifar10", "cifar100")))
    import datasets

    raw = datasets.Image(decode=False)  # Pillow frees the interpreter lock, so threads decode
    rows = sources.load(corpus, split, data_dir).cast_column("img", raw)
    with ThreadPoolExecutor() as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_decode, rows["img"]))))
    fine = corpus == "cifar100"
    labels = torch.tensor(rows["fine_label" if fine else "label"][:])
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return Cifar(pixels.to(device), labels.to(device), 100 if fine else 10)


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
        mixing: Erases and mixes images, so that targets are probabilities; None gives labels.

    Raises:
        ValueError: There are fewer images than one batch.
    """

    def __init__(
        self,
        data: Cifar,
        batch_size: int,
        seed: int,
        padding: int = 4,
        mixing: augment.Mixing | None = None,
    ):
        if len(data) < batch_size:
            raise ValueError(f"{len(data)} images are fewer than a batch of {batch_size}")
        self.data, self.batch_size, self.padding, self.mixing = data, batch_size, padding, mixing
        self.generator = torch.Generator(data.pixels.device).manual_seed(seed)
        self.choices = torch.Generator().manual_seed(seed)  # of the mixing

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.data.pixels.device
        order = torch.randperm(len(self.data), generator=self.generator, device=device)
        for batch in order.split(self.batch_size)[: len(self)]:
            own = self.data.pixels[batch]
            pixels = augment.crop_flip(own, self.padding, self.generator, self.data.flips)
            images, labels = normalise(pixels, CIFAR10_MEAN, CIFAR10_STD), self.data.labels[batch]
            if self.mixing is not None:
                images, labels = self.mixing(images, labels, self.data.n_classes, self.choices)
            yield images, labels

    def state_dict(self) -> dict[str, Tensor]:
        """Position of the generators; an epoch that was cut short starts anew on resume."""
        return {"generator": self.generator.get_state(), "choices": self.choices.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved position."""
        self.generator.set_state(state["generator"])
        self.choices.set_state(state["choices"])


class _Decoded(Dataset):
    """Pictures as uint8 tensors `[3, S, S]` and class numbers; the worker decodes."""

    def __init__(self, corpus: str, split: str, transform: Any, data_dir: str | Path):
        import datasets

        rows = sources.load(corpus, split, data_dir)
        self.rows, self.transform = rows.cast_column("image", datasets.Image()), transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(row["image"].convert("RGB")), row["label"]


class ImageNetBatches:
    """ImageNet-1K as DeiT's and Swin's recipes train on it: decode, augment, normalise, mix.

    Random resized crop, flip and RandAugment in the workers; normalisation, random erasing, mixup
    or cutmix and label smoothing on the device. Endless; every epoch shows each image once, or with
    `repeats` fewer images more often.

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
        corpus: A source with the columns `image` and `label`.
        magnitude: Of RandAugment, of 10; 0 leaves it out.
        repeats: How often an epoch shows an image, see `gatebook.data.sharded.Deal`.
        mixing: Parameters of `gatebook.data.augment.Mixing`.

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
        corpus: str = "imagenet-1k",
        magnitude: float = 9.0,
        repeats: int = 1,
        **mixing: float,
    ):
        rows = _Decoded(corpus, "train", augment.TrainTransform(image_size, magnitude), data_dir)
        step = batch_size * parts * processes
        deal = Deal(len(rows), step, seed, rank=rank, processes=processes, repeats=repeats)
        self.mixing = augment.Mixing(**mixing)
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
            yield self.mixing(images, labels, self.n_classes, generator)

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
    corpus: str = "imagenet-1k",
    split: str = "validation",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The validation images in order: shorter side to S * 256 / 224, centre crop of S.

    Args:
        batch_size: Images in a batch, B; the last one may hold fewer.
        image_size: Side S of the network's input, pixels.
        device: Where a batch goes.
        workers: Processes that decode.
        data_dir: Local mirror with the columns `image` and `label`.
        corpus: A source with these columns.
        split: The part of the corpus; some papers report on its `test`.

    Yields:
        Images `[B, 3, S, S]` and class numbers `[B]`.

    Raises:
        DataUnavailableError: Neither the mirror nor the hub has it.
    """
    rows = _Decoded(corpus, split, augment.TestTransform(image_size), data_dir)
    for pixels, labels in DataLoader(rows, batch_size, num_workers=workers):
        pixels, labels = (t.to(device, non_blocking=True) for t in (pixels, labels))
        yield normalise(pixels, IMAGENET_MEAN, IMAGENET_STD), labels
