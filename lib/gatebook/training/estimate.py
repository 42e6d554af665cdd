"""What a job costs before anything is allocated: FLOPs, GPU-hours, memory, disk."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gatebook import measure
from gatebook.training import parallel
from gatebook.training.jobs import Job, build, flops_per_unit, without_storage
from gatebook.training.metrics import peak_tflops
from gatebook.training.recipe import Recipe, make_optimizer
from gatebook.training.tasks import BUILDERS, Task

ASSUMED_MFU = 0.3  # fraction of a GPU's peak that a run is taken to reach where none was timed
ASSUMED_GPU = "H100"  # where no GPU is there and none was named
BYTES_A_PARAMETER = 16  # float32: weight, gradient, and Adam's two moments
GIB = 2**30
_ONE = {"tokens": "a token", "images": "an image", "seconds": "a second of sound"}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The price of one job."""

    job: Job
    parameters: int
    unit: str  # tokens, images, seconds
    units: float  # of the whole run
    steps: int  # optimiser steps
    flops_per_unit: float  # forward and backward
    gpus: int
    gpu: str  # a part of its name
    units_per_second: float  # of one GPU
    source: str  # where that speed comes from
    memory: dict[str, float]  # GiB a GPU, for each way to save it
    checkpoint_gib: float  # one checkpoint
    disk_gib: float  # those that are kept, one in the making, and the weights

    @property
    def gpu_hours(self) -> float:
        """Hours on one GPU, or the sum over several."""
        return self.units / self.units_per_second / 3600

    def lines(self) -> list[str]:
        """The estimate in words."""
        hours = self.gpu_hours / self.gpus
        memory = ", ".join(f"{name} {gib:.1f}" for name, gib in self.memory.items())
        return [
            f"{self.job.arm}: {self.parameters / 1e6:,.1f} M parameters, "
            f"{self.flops_per_unit / 1e9:,.2f} GFLOPs for {_ONE[self.unit]}",
            f"  work: {big(self.units)} {self.unit} in {self.steps:,} steps, "
            f"{self.units * self.flops_per_unit:.2e} FLOPs",
            f"  time: {self.gpu_hours:,.1f} GPU-hours, {hours:,.1f} h on {self.gpus} {self.gpu}; "
            f"{self.units_per_second:,.0f} {self.unit}/s a GPU ({self.source})",
            f"  memory [GiB a GPU]: {memory}",
            f"  disk: {self.checkpoint_gib:.1f} GiB a checkpoint, {self.disk_gib:.1f} GiB in all",
        ]


def estimate(job: Job, *, gpus: int = 1, gpu: str = "", probe: bool = True) -> Estimate:
    """The price of a job.

    The model is built on the meta device. Where a GPU is there, some steps of random data are timed
    on it (`probe`); else the speed is a fraction of the peak in a table, and says so.

    Args:
        job: The run.
        gpus: How many share it. Speed is taken to grow with their number.
        gpu: A part of the GPU's name, such as "A100", to price another than the one here.
        probe: Whether to time steps if a GPU is there and `gpu` is not given.

    Raises:
        ValueError: A job that cannot be built, processes that cannot share its batch, or a GPU that
            is not in the table.
    """
    task = build(job, processes=gpus)
    with torch.device("meta"):
        model = task.model()
    parameters, flops = measure.parameters(model), flops_per_unit(task)
    units = sum(recipe.steps * task.units_per_step(recipe) for recipe in task.recipes)
    if probe and not gpu and torch.cuda.is_available() and job.device != "cpu":
        gpu = torch.cuda.get_device_name()
        speed = task.per_sample / seconds_per_sample(task, job)
        source = "timed here"
    else:
        gpu = gpu or ASSUMED_GPU
        peak = peak_tflops(gpu, task.recipes[0].precision)
        if peak is None:
            raise ValueError(f"the peak of {gpu!r} is not known; see gatebook.training.metrics")
        speed = ASSUMED_MFU * peak * 1e12 / flops
        source = f"assumed: {ASSUMED_MFU:.0%} of its peak"
    state = BYTES_A_PARAMETER * parameters / GIB
    checkpoint = 12 * parameters / GIB  # without gradients
    return Estimate(
        job=job,
        parameters=parameters,
        unit=task.unit,
        units=units,
        steps=task.steps,
        flops_per_unit=flops,
        gpus=gpus,
        gpu=gpu,
        units_per_second=speed,
        source=source,
        memory=_memory(task, state, gpus),
        checkpoint_gib=checkpoint,
        disk_gib=checkpoint * (job.keep_checkpoints + 1) + 4 * parameters / GIB,
    )


def of_chapter(
    chapter: Any,
    *,
    job: Callable[[str], Job],
    gpus: int = 1,
    gpu: str = "",
    scale: str = "full",
    arms: list[str] | None = None,
) -> Iterator[Estimate]:
    """The price of the arms of a chapter (of all by default), one after the other.

    None if they are no jobs, unless some were named.
    """
    settings = chapter.scales[scale].settings
    if arms or settings.get("task") in BUILDERS:
        for arm in arms or settings["arms"]:
            yield estimate(job(arm), gpus=gpus, gpu=gpu)


def _memory(task: Task, state: float, gpus: int) -> dict[str, float]:
    """GiB a GPU: states and what the backward pass needs, with and without ways to save."""
    kept, recomputed = (x / GIB for x in activation_bytes(task))
    found = {"plain": state + kept, "recomputed": state + recomputed}
    if gpus > 1:
        found |= {
            "sharded": state / gpus + kept,
            "sharded and recomputed": state / gpus + recomputed,
        }
    return found


def activation_bytes(task: Task) -> tuple[int, int]:
    """What a forward pass keeps for the backward pass, for one batch of a process.

    Counted on tensors without storage. Kernels of ours on a GPU keep something else than the
    PyTorch forms that are counted here.

    Returns:
        Bytes when everything is kept, and when blocks are computed again: their inputs, and one
        block at a time in full. Both with a gradient beside the largest tensor.
    """
    with torch.device("meta"):
        blocks = len(parallel.blocks(task.model()))
    (kept, largest), (inputs, widest) = (_saved(task, recompute) for recompute in (False, True))
    return kept + largest, inputs + max(0, kept - inputs) // blocks + widest


def _saved(task: Task, recompute: bool) -> tuple[int, int]:
    """Bytes that autograd keeps besides parameters, and those of the largest tensor among them."""
    sizes: dict[int, int] = {}
    alive: list[Any] = []  # storages, so that no other takes the name of one

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return x

    with without_storage(task, task.batch, recompute) as (model, weights, batch):
        own = {x.untyped_storage()._cdata for x in weights.values()}
        half = task.recipes[0].precision == "bf16"
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that mixed types are slow: nothing is computed
            task.loss(model, batch)
    return sum(sizes.values()), max(sizes.values(), default=0)


def seconds_per_sample(task: Task, job: Job, *, steps: int = 4) -> float:
    """Time of a sample on this GPU, from some optimiser steps on random data.

    A step is timed with two batches at most and its optimiser apart, so that a recipe that
    accumulates many batches costs no more than one that does not.
    """
    recipe, device = task.recipes[0], torch.device("cuda")
    torch.manual_seed(job.seed)
    model = task.model().to(device).train()
    if job.recompute:
        parallel.recompute(model)
    if task.compile:
        for block in parallel.blocks(model):
            block.compile()
    optimizer = make_optimizer(model, recipe)
    from accelerate.utils import send_to_device

    batch = send_to_device(task.sample(task.batch), device)
    passes, updates = [], []
    for _ in range(steps + 2):
        passes.append(_timed(lambda: _pass(task, recipe, model, batch)))
        updates.append(_timed(lambda: _update(model, optimizer, recipe)))
    passes, updates = sorted(passes[2:]), sorted(updates[2:])
    middle = steps // 2
    step = passes[middle] * recipe.accumulate + updates[middle]
    return step / (task.batch * recipe.accumulate)


def _pass(task: Task, recipe: Recipe, model: nn.Module, batch: Any) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=recipe.precision == "bf16"):
        loss = task.loss(model, batch)
    loss.backward()


def _update(model: nn.Module, optimizer: Optimizer, recipe: Recipe) -> None:
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _timed(work: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def big(x: float) -> str:
    """A number in words: 7.00 billion."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if x >= size:
            return f"{x / size:,.2f} {name}"
    return f"{x:,.0f}"
