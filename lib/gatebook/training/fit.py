"""`fit`: one training loop on Hugging Face Accelerate.

The loop knows a model, batches and a loss; a model knows nothing of the loop. Started in one
process it trains on one device; started under `torchrun` the same call trains on all processes.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatebook.training import checkpoint, parallel
from gatebook.training.metrics import Log, Work
from gatebook.training.recipe import PRECISIONS, Recipe, make_optimizer


@dataclass
class History:
    """What a run did: the loss of each optimiser step, and the time it took."""

    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False  # asked to stop before the last step

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
    strategy: str = "ddp",
    compile: bool = False,
    recompute: bool = False,
    progress: Callable[..., Iterable[int]] | None = None,
    work: Work | None = None,
    log_path: str | Path | None = None,
    log_every: int = 1,
    log_from: int = 0,
    tensorboard_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 0,
    keep_checkpoints: int = 3,
    resume: bool = False,
    stop: Callable[[], bool] | None = None,
) -> History:
    """Train `model` in place.

    Args:
        model: parameters are updated in place and end up on the device.
        batches: this process's batches (any nesting of tensors), repeated from the start when they
            run out. One that has `state_dict` and `load_state_dict` is asked for its position at a
            checkpoint; any other is wound forward on resume, so the order of batches must then be
            fixed.
        loss_fn: `loss_fn(model, batch)` gives a scalar, a mean over the batch: with several
            processes the gradient is the mean of theirs, so their batches must be of one size.
        recipe: optimiser, schedule, precision.
        device: `cpu`, `cuda`, … ; under a launcher Accelerate picks the process's own.
        strategy: with several processes, `ddp` (a copy of the model on each) or `fsdp` (a part).
        compile: compile the model's blocks with `torch.compile`.
        recompute: keep the blocks' inputs only, and compute the rest again in the backward pass.
        progress: wraps the range of steps, such as `run.progress`; its second argument is called
            for the words beside the bar.
        work: what a step processes and costs, for tokens a second and the fraction of the device's
            peak (MFU).
        log_path: file that gets a JSON line each `log_every` steps (step, loss, lr, grad_norm,
            seconds, and with `work` speed and MFU). The loss is the mean over all processes and
            over the steps since the line before.
        log_every: steps between two lines; the last step has one, too. Reading a number waits for
            the device.
        log_from: number of the first step in the log, for a run of several recipes.
        tensorboard_dir: folder for the same numbers as TensorBoard events, or None.
        checkpoint_dir: folder for checkpoints, one folder each, written whole or not at all.
        checkpoint_every: optimiser steps between checkpoints, the last of which is that of the last
            step; 0 writes none.
        keep_checkpoints: number of newest checkpoints that are kept.
        resume: continue from the newest whole checkpoint in `checkpoint_dir`, if there is one.
        stop: asked each `log_every` steps; once it is true on some process, all write a checkpoint
            (if they have a folder) and return what was done until then.

    Returns:
        The loss of every optimiser step of this call, and its duration in seconds.

    Raises:
        FloatingPointError: the loss is no longer finite; the message names the step.
        CheckpointError: all checkpoints are damaged, or the last one could not be written. That
            one before the last cannot be written is a warning, and training goes on.
        ValueError: `batches` is empty, or checkpoints are asked for without a folder.
    """
    if (checkpoint_every or resume) and checkpoint_dir is None:
        raise ValueError("checkpoint_every and resume need checkpoint_dir")
    accelerator = _accelerator(recipe, device)
    model = parallel.distribute(model, accelerator, strategy, compile=compile, recomputed=recompute)
    optimizer = make_optimizer(model, recipe)
    plain = model
    if strategy == "ddp":
        model = accelerator.prepare(model)
    model.train()
    first = checkpoint.restore(checkpoint_dir, model, optimizer, batches) if resume else 0
    wound = 0 if checkpoint.has_state(batches) else first * recipe.accumulate
    stream, history, lazy = _endless(batches, skip=wound), History(), []
    recent: list[Tensor] = []  # since the last line of the log
    start = time.perf_counter()

    def keep(step: int) -> None:
        checkpoint.save(checkpoint_dir, step, model, optimizer, batches, keep=keep_checkpoints)

    with ExitStack() as stack:
        main = accelerator.is_main_process
        log = stack.enter_context(Log(log_path, tensorboard_dir, work, main=main))
        if recompute:
            stack.callback(parallel.keep_activations, plain)
        steps = range(first, recipe.steps)
        for step in progress(steps, log.words) if progress and main else steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step)
            loss, norm = _step(accelerator, model, optimizer, stream, loss_fn, recipe)
            lazy.append(loss)
            recent.append(loss)
            done = step + 1
            due = done % log_every == 0 or done == recipe.steps
            if log.wanted and due:
                log.write(
                    log_from + step,
                    parallel.mean(torch.stack(recent).mean()),
                    norm,
                    recipe.lr_at(step),
                )
            if due:
                recent.clear()
            if stop and due and done < recipe.steps and parallel.any_process(stop(), loss.device):
                history.stopped = True
                if checkpoint_dir is not None:
                    keep(done)
                break
            if checkpoint_every and (done % checkpoint_every == 0 or done == recipe.steps):
                try:
                    keep(done)
                except checkpoint.CheckpointError as error:
                    if done == recipe.steps:
                        raise
                    warnings.warn(f"{error}. Training goes on without it", stacklevel=2)
            if len(lazy) == 100:
                _collect(history, lazy, first)
    _collect(history, lazy, first)
    history.seconds = time.perf_counter() - start
    return history


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
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    recipe: Recipe,
) -> tuple[Tensor, Tensor | None]:
    """One optimiser step over `accumulate` batches: mean loss and gradient norm."""
    total, norm = 0.0, None
    for part in range(recipe.accumulate):
        batch = _to(next(stream), accelerator.device)
        with parallel.synchronised(model, last=part == recipe.accumulate - 1):
            with accelerator.autocast():
                loss = loss_fn(model, batch)
            accelerator.backward(loss)
        total = total + loss.detach() / recipe.accumulate
    if recipe.clip_norm is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, parallel.whole(norm)


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
    losses = parallel.mean(torch.stack(lazy).float()).tolist() if lazy else []
    lazy.clear()
    for loss in losses:
        if not math.isfinite(loss):
            step = first + len(history.loss)
            raise FloatingPointError(f"the loss is {loss} at step {step}: lower lr or clip harder")
        history.loss.append(loss)
