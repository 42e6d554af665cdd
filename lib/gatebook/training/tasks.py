"""What jobs can train: language models, image classifiers, CIFAR classifiers, speech separators.

Each builder turns a job and the settings of its chapter's scale into a `Task`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gatebook.training.recipe import Recipe

if TYPE_CHECKING:
    from gatebook.training.jobs import Job


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a job trains, on one of several processes.

    Attributes:
        name: The model's, for `gatebook.models.create`.
        model: Makes it, with fresh weights.
        batches: Opens this process's batches.
        loss: Of a model and a batch.
        sample: A batch of n random samples, of the shapes of the real ones.
        recipes: One after the other, with `accumulate` for this number of processes.
        batch: Samples of a batch on one process.
        processes: How many take part.
        unit, per_sample: What a sample holds, such as 2048 tokens.
        checkpoint_every: Optimiser steps.
        compile: Whether the job or the chapter's scale wants compiled blocks. The scale's wish
            counts on a GPU alone: for a CPU, compiling takes minutes.
        ema: Decay of averaged weights, which the run ends with; 0 for none.
        adaptive_clip: Ratio of adaptive gradient clipping; 0 for none.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    sample: Callable[[int], Any]
    recipes: tuple[Recipe, ...]
    batch: int
    processes: int
    unit: str
    per_sample: float
    checkpoint_every: int
    compile: bool = False
    ema: float = 0.0
    adaptive_clip: float = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps of all recipes together."""
        return sum(recipe.steps for recipe in self.recipes)

    def units_per_step(self, recipe: Recipe) -> float:
        """Units of one optimiser step of all processes together."""
        return self.batch * recipe.accumulate * self.processes * self.per_sample


def divide(batch: int, accumulate: int, processes: int, largest: int = 0) -> tuple[int, int]:
    """Batch and accumulation of each process that leave the global batch as it is.

    Args:
        batch: Samples of a batch in the recipe, for one process.
        accumulate: Batches for each optimiser step in the recipe.
        processes: How many share them.
        largest: Samples that a process can take at once; 0 is `batch`.

    Returns:
        Samples of a batch, and batches for each step, on each process.

    Raises:
        ValueError: The global batch is no multiple of `processes`.
    """
    whole = batch * accumulate
    if whole % processes:
        raise ValueError(f"{processes} processes do not share a global batch of {whole} evenly")
    own = whole // processes
    size = max(n for n in range(1, min(largest or batch, own) + 1) if own % n == 0)
    return size, own // size


def language_model(
    job: "Job", s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
) -> Task:
    """Next-token prediction on a streamed text (gla, sqa, moh)."""
    from gatebook import models
    from gatebook.data import stream, text
    from gatebook.measure.sequence import auxiliary_loss, sequence_loss

    recipe = Recipe(**s.recipe)
    batch, accumulate = divide(s.batch, recipe.accumulate, processes, job.batch)
    whole = batch * accumulate * processes
    config = models.config(s.model, **(s.size | arm))

    def batches() -> Iterable[Any]:
        tokenizer = text.load_tokenizer(s.corpus, s.tokenizer, job.data_dir)
        return stream.PackedStream(
            s.corpus,
            "train",
            tokenizer,
            end_of_text=s.end_of_text,
            length=s.length,
            batch_size=batch,
            data_dir=job.data_dir,
            rank=rank,
            processes=processes,
            shards=max(n for n in range(1, 65) if whole % n == 0),
        )

    def sample(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(config.vocab_size, (n, s.length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    return Task(
        name=s.model,
        model=lambda: models.create(s.model, **(s.size | arm)),
        batches=batches,
        loss=lambda model, batch: sequence_loss(model, batch) + auxiliary_loss(model),
        sample=sample,
        recipes=(replace(recipe, accumulate=accumulate),),
        batch=batch,
        processes=processes,
        unit="tokens",
        per_sample=s.length,
        checkpoint_every=getattr(s, "checkpoint_every", 0),
    )


def image_classification(
    job: "Job", s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
) -> Task:
    """Pictures with RandAugment and mixing (the vision backbones); the settings' `augment` holds
    what differs from the defaults of `gatebook.data.images.ImageNetBatches`."""
    from torch.nn import functional as F

    from gatebook import models
    from gatebook.data import images

    recipe = Recipe(**{"steps": s.steps, **s.recipe})
    batch, accumulate = divide(s.batch, recipe.accumulate, processes, job.batch)
    config = models.config(s.name, **(s.model | arm))

    def batches() -> Iterable[Any]:
        return images.ImageNetBatches(
            batch,
            config.image_size,
            job.seed,
            device=device,
            workers=s.workers,
            data_dir=job.data_dir,
            n_classes=config.n_classes,
            parts=accumulate,
            rank=rank,
            processes=processes,
            corpus=getattr(s, "corpus", "imagenet-1k"),
            **getattr(s, "augment", {}),
        )

    def sample(n: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randn(n, 3, config.image_size, config.image_size)
        return pixels, torch.full((n, config.n_classes), 1 / config.n_classes)

    return Task(
        name=s.name,
        model=lambda: models.create(s.name, **(s.model | arm)),
        batches=batches,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        sample=sample,
        recipes=(replace(recipe, accumulate=accumulate),),
        batch=batch,
        processes=processes,
        unit="images",
        per_sample=1,
        checkpoint_every=s.checkpoint_every,
    )


def cifar_classification(
    job: "Job", s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
) -> Task:
    """CIFAR-10 or CIFAR-100 from memory, cropped and flipped; mixed if there is `augment`.

    Raises:
        ValueError: Several processes: the data are not shared out.
    """
    from torch.nn import functional as F

    from gatebook import models
    from gatebook.data import augment, images

    if processes > 1:
        raise ValueError(f"{s.corpus} is trained on by one process; got {processes}")
    config = models.config(s.name, **(s.model | arm))

    def batches() -> Iterable[Any]:
        data = images.cifar10("train", job.data_dir, device, s.corpus)
        mixing = augment.Mixing(**s.augment) if hasattr(s, "augment") else None
        return images.CifarBatches(data, job.batch or s.batch, job.seed, mixing=mixing)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 3, 32, 32), torch.randint(config.n_classes, (n,))

    return Task(
        name=s.name,
        model=lambda: models.create(s.name, **(s.model | arm)),
        batches=batches,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        sample=sample,
        recipes=(Recipe(**{"steps": s.steps, **s.recipe}),),
        batch=job.batch or s.batch,
        processes=processes,
        unit="images",
        per_sample=1,
        checkpoint_every=s.checkpoint_every,
    )


def speech_separation(
    job: "Job", s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
) -> Task:
    """Two speakers from mixtures that are made anew (mossformer)."""
    from gatebook import models
    from gatebook.data import speech
    from gatebook.measure import audio

    def loss(model: nn.Module, sources: Tensor) -> Tensor:
        return audio.separation_loss(model(sources.sum(1)), sources, floor_db=-30.0)

    audio.best_order(*torch.rand(2, 1, 2, 8))  # torchmetrics keeps tensors: let them hold numbers
    recipes = [Recipe(**{**s.recipe, **stage}) for stage in s.stages]
    batch, accumulate = divide(s.batch, recipes[0].accumulate, processes, job.batch)
    draw = {"seed": job.seed, "count": s.batches, "samples": s.samples, "data_dir": job.data_dir}
    own = {"batch_size": batch, "device": device, "rank": rank, "processes": processes}
    return Task(
        name=s.model,
        model=lambda: models.create(s.model, **arm),
        batches=lambda: speech.training_batches(s.corpus, **draw, **own),
        loss=loss,
        sample=lambda n: torch.randn(n, 2, s.samples),
        recipes=tuple(replace(recipe, accumulate=accumulate) for recipe in recipes),
        batch=batch,
        processes=processes,
        unit="seconds",
        per_sample=s.samples / speech.SAMPLE_RATE,
        checkpoint_every=s.checkpoint_every,
    )


BUILDERS: dict[str, Callable[..., Task]] = {
    "stream": language_model,
    "imagenet": image_classification,
    "cifar": cifar_classification,
    "mixtures": speech_separation,
}
