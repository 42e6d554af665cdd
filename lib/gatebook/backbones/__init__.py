"""Every image backbone of the book at two sizes: one recipe, the same pictures, costs measured.

A backbone is an entry of `chapters/backbones.yml`: the name of a model of `gatebook.models`, what
is changed for each size, and what is changed for pictures of 224 pixels.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook import measure
from gatebook import models as library
from gatebook.data import images
from gatebook.data.augment import Mixing
from gatebook.errors import unknown
from gatebook.measure import vision
from gatebook.models import (
    activator,
    convit,
    gated_swinrmt,
    hornet,
    ninformer,
    shvit,
    svt,
    swin,
    vig,
    vit,
)
from gatebook.training import Recipe
from gatebook.training.classify import fit_classifier

# each file of models is named, so that evidence is known to depend on it
MODULES = {
    module.__name__
    for module in (
        *(activator, convit, gated_swinrmt, hornet, ninformer),
        *(shvit, svt, swin, vig, vit),
    )
}
CORPORA = ("cifar10", "digits")
LARGE = 224  # pixels


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A backbone of the comparison.

    Raises:
        ValueError: Another model than the library's, or a change that it does not know.
    """

    model: str  # of `gatebook.models`
    sizes: dict[str, dict[str, Any]]  # changes to its configuration, by size
    large: dict[str, Any]  # further changes for pictures of 224 pixels
    mixes: str = ""  # how tokens are mixed, in a few words
    fan_in: bool = False  # weights of variance 1 / fan-in, in place of the model's own start

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        known = vars(library.config(self.model))
        for changes in (*self.sizes.values(), self.large):
            for name in changes:
                if name not in known:
                    raise ValueError(unknown(f"field of {self.model}", name, known))

    def build(self, size: str, *, n_classes: int = 10, large: bool = False) -> nn.Module:
        """The backbone at a size, for pictures of 32 pixels, or of 224.

        Raises:
            ValueError: An unknown size.
        """
        if size not in self.sizes:
            raise ValueError(unknown(f"size of {self.model}", size, self.sizes))
        changes = self.sizes[size] | {"n_classes": n_classes} | (self.large if large else {})
        model = library.create(self.model, **changes)
        return model.apply(_fan_in) if self.fan_in else model


def _fan_in(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)


def entries(settings: dict[str, dict[str, Any]]) -> dict[str, Entry]:
    """Backbones by name, from the settings of the chapter."""
    return {name: Entry(**fields) for name, fields in settings.items()}


# --- accuracy ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One backbone that is trained and scored, as plain data for another process."""

    backbone: str
    size: str
    seed: int
    entry: dict[str, Any]
    corpus: str  # cifar10, or digits: scikit-learn's, enlarged to 32 pixels
    batch: int
    recipe: dict[str, Any]
    mixing: dict[str, float]  # as for `gatebook.data.augment.Mixing`; empty leaves it out
    data_dir: str
    device: str
    held_out: int = 0  # last training pictures that are kept apart and scored, not the test ones

    def __str__(self) -> str:
        """For messages."""
        rate = f", rate {self.recipe['lr']:g}" if self.held_out else ""
        return f"{self.backbone} of {self.size} parameters, seed {self.seed}{rate}"


def run_trial(trial: Trial) -> dict[str, float]:
    """Train a backbone and score it.

    Returns:
        Accuracy (a share) and cross-entropy (nats) on the pictures that are scored, and the mean
        loss in the last tenth of the training; all nan if it diverged.
    """
    train, scored = (pictures(trial.corpus, part, trial.data_dir, trial.device) for part in _PARTS)
    if trial.held_out:
        train, scored = _parted(train, trial.held_out)
    mixing = Mixing(**trial.mixing) if trial.mixing else None
    batches = images.CifarBatches(train, trial.batch, trial.seed, mixing=mixing)
    recipe = Recipe(**trial.recipe)
    torch.manual_seed(trial.seed)
    model = Entry(**trial.entry).build(trial.size, n_classes=train.n_classes)
    try:
        losses = fit_classifier(model, batches, recipe, device=trial.device).loss
    except FloatingPointError:
        return dict.fromkeys(("accuracy", "cross_entropy", "training_loss"), math.nan)
    found = vision.score(model, scored.in_order(1000), trial.device)
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "accuracy": found.accuracy,
        "cross_entropy": found.cross_entropy,
        "training_loss": sum(last) / len(last),
    }


_PARTS = ("train", "test")


def _parted(data: images.Cifar, count: int) -> tuple[images.Cifar, images.Cifar]:
    """All but the last pictures, and these."""
    return tuple(
        images.Cifar(data.pixels[part], data.labels[part], data.n_classes, data.flips)
        for part in (slice(-count), slice(-count, None))
    )


def best_rate(tried: dict[float, float]) -> float:
    """The rate of the highest accuracy; one that diverged (nan) loses, and of equals the lowest.

    Args:
        tried: Accuracy by learning rate.
    """
    return max(sorted(tried), key=lambda rate: -1.0 if math.isnan(tried[rate]) else tried[rate])


@cache  # a process decodes a corpus once
def pictures(corpus: str, part: str, data_dir: str = "", device: str = "cpu") -> images.Cifar:
    """A split of a corpus, pictures of 32 pixels.

    Digits are scikit-learn's: 8 x 8 pixels enlarged to 32 x 32, grey in three channels; every
    fourth is a test picture.

    Raises:
        ValueError: An unknown corpus.
        DataUnavailableError: CIFAR-10 cannot be had.
    """
    if corpus not in CORPORA:
        raise ValueError(unknown("corpus", corpus, CORPORA))
    if corpus == "cifar10":
        return images.cifar10(part, data_dir, device)
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    pixels = F.interpolate(small, size=32, mode="bilinear").round().to(torch.uint8)
    chosen = (torch.arange(len(pixels)) % 4 == 3) == (part == "test")
    labels = torch.from_numpy(digits.target).long()[chosen]
    pixels = pixels[chosen].repeat(1, 3, 1, 1)
    return images.Cifar(pixels.to(device), labels.to(device), flips=False)


# --- costs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a backbone costs at one size of pictures, measured once."""

    pixels: int  # side of a picture
    device: str  # cpu or cuda
    parameters: int
    flops: float  # of a forward pass for one picture, two for each multiply-add of matrix products
    images_per_second: float  # forward pass; on a CPU for each second of one processor
    memory: float  # bytes that a forward and backward pass adds for one picture; nan on a CPU


def costs(
    chosen: dict[str, Entry],
    size: str,
    *,
    large: bool,
    batch: int,
    repeats: int,
    device: str = "cpu",
    precision: str = "fp32",
    min_seconds: float = 0.1,
) -> Iterator[tuple[str, int, Cost]]:
    """Count and time backbones.

    Operations are counted on the meta device, whatever the backbones are timed on, so that a
    fused kernel counts like the matrix products that it replaces. On a CPU the backbones take
    turns on one thread, one pass a repeat, in processor time.

    Args:
        chosen: Backbones by name.
        size: One of their sizes.
        large: Pictures of 224 pixels rather than 32.
        batch: Pictures at once.
        repeats: Measurements of each.
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" for autocast.
        min_seconds: Of a measurement on a GPU.

    Yields:
        Name, number of the repeat, cost.
    """
    pixels = LARGE if large else 32
    counted, calls = {}, {}
    for name, entry in chosen.items():
        with torch.device("meta"):
            model = entry.build(size, large=large).eval()
            flops = measure.flops(model, torch.empty(1, 3, pixels, pixels))
        counted[name] = {"parameters": measure.parameters(model), "flops": flops}
        model = entry.build(size, large=large).to(device).eval()
        x = torch.randn(batch, 3, pixels, pixels, device=device)
        calls[name] = partial(_forward, model, x, precision)
    memory = {name: _training_memory(call) / batch for name, call in calls.items()}
    timer = _processor_ms if device == "cpu" else partial(measure.latency, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for repeat in range(repeats):
            for name, call in calls.items():
                if repeat == 0:
                    call()
                ms = timer(call) if device == "cpu" else timer(call, min_seconds=min_seconds)
                speed = {"images_per_second": 1000 * batch / ms, "memory": memory[name]}
                yield (name, repeat, Cost(pixels=pixels, device=device, **counted[name], **speed))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor, precision: str) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        model(x)


def _processor_ms(call: partial) -> float:
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


def _training_memory(call: partial) -> float:
    model, x, precision = call.args
    if not x.is_cuda:
        return math.nan

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(x).float().sum()
        loss.backward()

    model.train()
    step()  # allocates the gradients
    bytes_ = measure.peak_memory(step)
    model.zero_grad()
    model.eval()
    return bytes_
