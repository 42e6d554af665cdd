"""A training run as plain data, so that every process of a cluster can make it again.

`Job` names a chapter's run; `build` turns it into what `fit` needs; `train` trains, keeps
checkpoints, resumes, and writes the final weights.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gatebook.errors import unknown
from gatebook.training import parallel
from gatebook.training.fit import History, fit
from gatebook.training.metrics import Work, logged_losses, peak_tflops
from gatebook.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of a chapter."""

    chapter: str  # as in chapters/SLUG.yml
    arm: str  # a key of the scale's arms
    scale: str = "full"
    seed: int = 0
    max_steps: int = 0  # optimiser steps; 0 is the whole recipe
    batch: int = 0  # samples that a process takes at once; 0 is the recipe's, or less
    data_dir: str = ""  # local mirror of the data sets
    folder: str = ""  # for checkpoints, log and weights; empty: runs/SLUG/SCALE/ARM-SEED
    device: str = "auto"  # auto, cpu or cuda
    strategy: str = "ddp"  # or fsdp
    compile: bool = False
    recompute: bool = False  # of activations in the backward pass
    tensorboard: bool = False
    log_every: int = 10
    checkpoint_every: int = 0  # 0: the scale's own, or 20 times a run
    keep_checkpoints: int = 3
    settings: dict[str, Any] = field(default_factory=dict)  # instead of the scale's own

    def path(self, root: Path) -> Path:
        """The run's folder."""
        short = [f"first-{self.max_steps}"] if self.max_steps else []  # another schedule
        name = "-".join(map(str, (self.arm, self.seed, *short, *self.settings.values())))
        return root / (self.folder or Path("runs") / self.chapter / self.scale / name)


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


def build(job: Job, *, rank: int = 0, processes: int = 1, device: str = "cpu") -> Task:
    """What a job trains, on process `rank` of `processes`. No data are opened yet.

    Raises:
        ValueError: An unknown chapter, scale or arm, or one that has no such run.
    """
    from gatebook.evidence import ledger, provenance

    root = provenance.root()
    if job.chapter not in ledger.chapters(root):
        raise ValueError(unknown("chapter", job.chapter, ledger.chapters(root)))
    scales = ledger.load_chapter(root, job.chapter).scales
    if job.scale not in scales:
        raise ValueError(unknown("scale", job.scale, scales))
    plan = scales[job.scale]
    kind = plan.settings.get("task", "")
    if kind not in BUILDERS:
        raise ValueError(
            f"{job.chapter} at {job.scale} cannot be trained as a job: its task is {kind!r}, and "
            f"jobs know {', '.join(BUILDERS)}"
        )
    for name in job.settings:
        if name not in plan.settings:
            raise ValueError(unknown(f"setting of {job.chapter}", name, plan.settings))
    arms = plan.settings["arms"]  # the changes to the model of each run
    if job.arm not in arms:
        raise ValueError(unknown(f"arm of {job.chapter} at {job.scale}", job.arm, arms))
    settings = SimpleNamespace(**(plan.settings | job.settings))
    task = BUILDERS[kind](job, settings, arms[job.arm], rank, processes, device)
    recipes = task.recipes
    if job.max_steps:
        recipes = (replace(recipes[0], steps=min(job.max_steps, recipes[0].steps)),)
    every = job.checkpoint_every or task.checkpoint_every or max(1, task.steps // 20)
    return replace(task, recipes=recipes, checkpoint_every=every)


def train(job: Job, *, progress: Any = None, stop: Callable[[], bool] | None = None) -> History:
    """Train a job on this process, together with the others that a launcher started.

    Continues from the newest checkpoint in the job's folder. At the end the first process writes
    `weights/` (for `gatebook.models.load`) and `result.json`.

    Args:
        job: What to train.
        progress: As for `fit`.
        stop: As for `fit`: a run that is asked to stop can be resumed.

    A run that had ended takes no further step, and its weights are written again.

    Returns:
        Losses of the steps of this call.
    """
    from gatebook import models
    from gatebook.evidence import provenance

    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device(job.device)
    if device == "cuda":  # before data are put on "the" GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    task = build(job, rank=rank, processes=processes, device=device)
    folder = job.path(provenance.root())
    torch.manual_seed(job.seed)
    model, batches, history = task.model(), task.batches(), History()
    cost = flops_per_unit(task)
    for stage, recipe in enumerate(task.recipes):
        work = Work(
            unit=task.unit,
            per_step=task.units_per_step(recipe),
            flops_per_unit=cost,
            peak_flops=_peak(device, recipe.precision, processes),
        )
        part = fit(
            model,
            batches,
            task.loss,
            recipe,
            device=device,
            strategy=job.strategy,
            compile=job.compile,
            recompute=job.recompute,
            progress=progress,
            work=work,
            log_path=folder / "log.jsonl",
            log_every=job.log_every,
            log_from=sum(earlier.steps for earlier in task.recipes[:stage]),
            tensorboard_dir=folder / "tensorboard" if job.tensorboard else None,
            checkpoint_dir=folder / f"stage-{stage}",
            checkpoint_every=task.checkpoint_every,
            keep_checkpoints=job.keep_checkpoints,
            resume=True,
            stop=stop,
        )
        history.loss += part.loss
        history.seconds += part.seconds
        if part.stopped:
            history.stopped = True
            return history
    state = parallel.full_state(model)
    if rank == 0:
        final = task.model()
        final.load_state_dict(state)
        models.save(final, folder / "weights", name=task.name)
        losses = logged_losses(folder / "log.jsonl")  # of earlier calls, too
        result = {"job": asdict(job), "loss": losses, "log_every": job.log_every}
        (folder / "result.json").write_text(json.dumps(result))
    return history


@contextmanager
def without_storage(task: Task, samples: int, recompute: bool = False) -> Iterator[tuple]:
    """A task where tensors have shapes but hold no numbers: nothing is allocated or computed.

    Yields:
        The model as a function, its parameters by name, and a batch of `samples`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = task.model()
    if recompute:
        parallel.recompute(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty = partial(torch.empty_like, device="cpu")
        weights = {name: empty(p).requires_grad_() for name, p in model.named_parameters()}
        tensors = weights | {name: empty(b) for name, b in model.named_buffers()}
        yield partial(_call, model, tensors), weights, task.sample(samples)


def _call(model: nn.Module, tensors: dict[str, Tensor], *args: Any) -> Any:
    return functional_call(model, tensors, args)


def flops_per_unit(task: Task) -> float:
    """FLOPs of the forward and the backward pass for one unit, counted without computing.

    The backward pass counts twice the forward pass; recomputed activations do not count, so that
    MFU is that of useful work.
    """
    from gatebook import measure

    with without_storage(task, 1) as (model, _, batch):
        return 3 * measure.flops(task.loss, model, batch) / task.per_sample


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _peak(device: str, precision: str, processes: int) -> float | None:
    if device != "cuda":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(), precision)
    return None if peak is None else 1e12 * peak * processes


# ---------------------------------------------------------------- what jobs can train


def language_model(
    job: Job, s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
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
    job: Job, s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
) -> Task:
    """ImageNet-1K with mixing (swin)."""
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


def speech_separation(
    job: Job, s: SimpleNamespace, arm: dict, rank: int, processes: int, device: str
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
    "mixtures": speech_separation,
}
