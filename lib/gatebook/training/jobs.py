"""A training run as plain data, so that every process of a cluster can make it again.

`Job` names a chapter's run; `build` turns it into what `fit` needs; `train` trains, keeps
checkpoints, resumes, and writes the final weights.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from gatebook.training.hooks import Average, adaptive_clipping
from gatebook.training.metrics import Work, logged_losses, peak_tflops
from gatebook.training.tasks import BUILDERS, Task


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
    compile: bool = False  # the blocks; a scale with `compile: true` does it by itself on a GPU
    recompute: bool = False  # of activations in the backward pass
    tensorboard: bool = False
    log_every: int = 10
    checkpoint_every: int = 0  # 0: the scale's own, or 20 times a run
    keep_checkpoints: int = 3
    settings: dict[str, Any] = field(default_factory=dict)  # instead of the scale's own

    def path(self, root: Path) -> Path:
        """The run's folder."""
        short = [f"first-{self.max_steps}"] if self.max_steps else []  # another schedule
        own = [_short(value) for value in self.settings.values()]
        name = "-".join(map(str, (self.arm, self.seed, *short, *own)))
        return root / (self.folder or Path("runs") / self.chapter / self.scale / name)


def _short(value: Any) -> str:
    """A setting in a folder's name: itself, or for a mapping or list a digest."""
    if isinstance(value, dict | list | tuple):
        text = json.dumps(value, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]
    return str(value)


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
    options = {name: getattr(settings, name, 0.0) for name in ("ema", "adaptive_clip")}
    if options["ema"] and job.strategy != "ddp":
        raise ValueError('averaged weights (ema) need the strategy "ddp"')
    options["compile"] = job.compile or getattr(settings, "compile", False)
    return replace(task, recipes=recipes, checkpoint_every=every, **options)


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
    average = Average(batches, model, task.ema) if task.ema else None
    with ExitStack() as stack:
        if average:
            stack.enter_context(average.following())
        if task.adaptive_clip:
            stack.enter_context(adaptive_clipping(model, task.adaptive_clip))
        for stage, recipe in enumerate(task.recipes):
            work = Work(
                unit=task.unit,
                per_step=task.units_per_step(recipe),
                flops_per_unit=cost,
                peak_flops=_peak(device, recipe.precision, processes),
            )
            part = fit(
                model,
                average or batches,
                task.loss,
                recipe,
                device=device,
                strategy=job.strategy,
                compile=job.compile or (task.compile and device == "cuda"),
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
    if average:
        average.apply()
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

    samples = 2  # a batch norm over one sample may have no variance
    with without_storage(task, samples) as (model, _, batch):
        return 3 * measure.flops(task.loss, model, batch) / (samples * task.per_sample)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _peak(device: str, precision: str, processes: int) -> float | None:
    if device != "cuda":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(), precision)
    return None if peak is None else 1e12 * peak * processes
