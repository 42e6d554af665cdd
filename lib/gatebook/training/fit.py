"""`fit`: one training loop on Hugging Face Accelerate.

The loop knows a model, batches and a loss; a model knows nothing of the loop. Started in one
process it trains on one device; started under `torchrun` or `accelerate launch` the same call
trains on all processes, because Accelerate wraps model, optimiser and gradient exchange.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatebook.errors import unknown

SCHEDULES = ("constant", "cosine", "onecycle")
OPTIMIZERS = ("adamw", "adam")
PRECISIONS = {"fp32": "no", "bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: optimiser, schedule, precision.

    Raises:
        ValueError: for an unknown schedule, optimiser or precision, or a step count below 1.
    """

    steps: int  # optimiser steps
    lr: float  # peak learning rate
    schedule: str = "cosine"  # constant, cosine or onecycle, after a linear warm-up
    warmup_steps: int = 0  # linear warm-up from 0 (constant and cosine)
    final_lr: float = 0.0  # learning rate that the cosine ends at
    optimizer: str = "adamw"  # adamw or adam
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01  # decoupled for adamw, L2 for adam
    decay_1d: bool = False  # also decay biases, norms and other one-dimensional parameters
    clip_norm: float | None = 1.0  # largest gradient norm; None switches clipping off
    precision: str = "fp32"  # fp32 or bf16 (autocast)
    accumulate: int = 1  # batches for each optimiser step

    def __post_init__(self) -> None:
        for kind, value, allowed in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise ValueError(unknown(kind, value, allowed))
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps and accumulate are at least 1, got {self}")

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if self.schedule == "onecycle":  # rise for 30 % of the steps, then fall; both are cosines
            rise = max(1, round(0.3 * self.steps))
            if step < rise:
                return self._between(self.lr / 25, self.lr, step / rise)
            return self._between(self.lr, self.lr / 25e4, (step - rise) / (self.steps - rise))
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        left = max(1, self.steps - self.warmup_steps)
        return self._between(self.lr, self.final_lr, (step - self.warmup_steps) / left)

    @staticmethod
    def _between(start: float, end: float, fraction: float) -> float:
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))


@dataclass
class History:
    """What a run did: the loss of each optimiser step, and the time it took."""

    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps_per_second(self) -> float:
        return len(self.loss) / self.seconds if self.seconds else 0.0


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    recipe: Recipe,
    *,
    device: str = "cpu",
    progress: Callable[..., Iterable[int]] | None = None,
    log_path: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
) -> History:
    """Train `model` in place.

    Args:
        model: parameters are updated in place and end up on the device.
        batches: batches (any nesting of tensors), repeated from the start when they run out. One
            that has `state_dict` and `load_state_dict` is asked for its position at a checkpoint;
            any other is wound forward on resume, so the order of batches must then be fixed.
        loss_fn: `loss_fn(model, batch)` gives a scalar.
        recipe: optimiser, schedule, precision.
        device: `cpu`, `cuda`, … ; under a launcher Accelerate picks the process's own.
        progress: wraps the range of steps, such as `run.progress`.
        log_path: file that gets one JSON line a step (step, loss, lr, grad_norm, seconds).
        checkpoint_dir: folder for checkpoints, one folder each, written whole or not at all.
        checkpoint_every: optimiser steps between checkpoints; 0 writes none.
        resume: continue from the newest checkpoint in `checkpoint_dir`, if there is one.

    Returns:
        The loss of every optimiser step of this call, and its duration in seconds.

    Raises:
        FloatingPointError: the loss is no longer finite; the message names the step.
        ValueError: `batches` is empty, or checkpoints are asked for without a folder.
    """
    if (checkpoint_every or resume) and checkpoint_dir is None:
        raise ValueError("checkpoint_every and resume need checkpoint_dir")
    accelerator = _accelerator(recipe, device)
    optimizer = make_optimizer(model, recipe)
    model, optimizer = accelerator.prepare(model.to(accelerator.device), optimizer)
    model.train()
    first = _resume(accelerator, checkpoint_dir, batches) if resume else 0
    stream = _endless(batches, skip=0 if _has_state(batches) else first * recipe.accumulate)
    history, start = History(), time.perf_counter()
    lazy: list[Tensor] = []  # losses stay on the device until they are needed
    steps = range(first, recipe.steps)
    log = open(log_path, "a", encoding="utf-8") if log_path else None  # noqa: SIM115
    try:
        for step in progress(steps, "training") if progress else steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step)
            loss, norm = _step(accelerator, model, optimizer, stream, loss_fn, recipe)
            lazy.append(loss)
            if log:
                _log(log, step, loss, norm, recipe.lr_at(step), start)
            if checkpoint_every and (step + 1) % checkpoint_every == 0:
                _save(accelerator, checkpoint_dir, step + 1, batches)
            if len(lazy) == 100:
                _collect(history, lazy, first)
    finally:
        if log:
            log.close()
    _collect(history, lazy, first)
    history.seconds = time.perf_counter() - start
    return history


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser. Weight decay spares one-dimensional parameters (unless `decay_1d`)
    and those that the model names in `no_weight_decay()`."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keeps = (parameter.ndim > 1 or recipe.decay_1d) and name not in spared
        (decay if keeps else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=recipe.lr, betas=recipe.betas, fused=fused or None)


def _accelerator(recipe: Recipe, device: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a notebook calls fit more than once
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=PRECISIONS[recipe.precision],
        gradient_accumulation_steps=recipe.accumulate,
    )


def _step(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    stream: Iterator[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    recipe: Recipe,
) -> tuple[Tensor, Tensor | None]:
    """One optimiser step over `accumulate` batches: mean loss and gradient norm."""
    total, norm = 0.0, None
    for part in range(recipe.accumulate):
        batch = _to(next(stream), accelerator.device)
        last = part == recipe.accumulate - 1
        with accelerator.accumulate(model), accelerator.autocast():
            loss = loss_fn(model, batch)
        accelerator.backward(loss)
        total = total + loss.detach() / recipe.accumulate
        if last:
            if recipe.clip_norm is not None:
                norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return total, norm


def _to(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def _endless(batches: Iterable[Any], skip: int = 0) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            if skip:
                skip -= 1
                continue
            yield batch
        if empty:
            raise ValueError("batches is empty: fit needs at least one batch")


def _collect(history: History, lazy: list[Tensor], first: int) -> None:
    losses = torch.stack(lazy).float().tolist() if lazy else []
    lazy.clear()
    for loss in losses:
        if not math.isfinite(loss):
            step = first + len(history.loss)
            raise FloatingPointError(f"the loss is {loss} at step {step}: lower lr or clip harder")
        history.loss.append(loss)


def _log(log: Any, step: int, loss: Tensor, norm: Tensor | None, lr: float, start: float) -> None:
    line = {
        "step": step,
        "loss": float(loss),
        "lr": lr,
        "grad_norm": None if norm is None else float(norm),
        "seconds": round(time.perf_counter() - start, 4),
    }
    log.write(json.dumps(line) + "\n")
    log.flush()


def _has_state(batches: Any) -> bool:
    return hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")


def _save(accelerator: Any, folder: str | Path, step: int, batches: Any) -> None:
    """Write checkpoint `step-N` under another name, then rename: it is whole or it is not there."""
    final = Path(folder) / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    accelerator.save_state(str(partial))
    if _has_state(batches):
        torch.save(batches.state_dict(), partial / "batches.pt")
    (partial / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _resume(accelerator: Any, folder: str | Path, batches: Any) -> int:
    found = sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".partial")
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    if _has_state(batches):
        batches.load_state_dict(torch.load(found[-1] / "batches.pt", weights_only=True))
    return int(json.loads((found[-1] / "step.json").read_text())["step"])
