"""Train every mixer on every task with the learning rate that suits it, and measure its costs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatebook import measure
from gatebook.layers.language import Decoder
from gatebook.measure.sequence import auxiliary_loss, sequence_loss
from gatebook.mixers import Make, Sizes, build, read, tasks
from gatebook.training import Recipe, fit
from gatebook.training.trials import open_pool, run_all

CHOICE_SEED = 900_001  # of the runs that choose a learning rate; they are not scored


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One model that is trained and scored, as plain data for another process."""

    mixer: str
    task: str
    lr: float
    seed: int
    choosing: bool  # whether it chooses the learning rate
    file: str  # of a mixer that is not the book's
    data_dir: str
    device: str
    settings: dict[str, Any]  # of the task: kind, steps, sizes, recipe, and the kind's own

    def __str__(self) -> str:
        """For messages."""
        return f"{self.mixer} on {self.task}, lr {self.lr}, seed {self.seed}"


def run_trial(trial: Trial) -> dict[str, float]:
    """Train a model and score it: see `Task.score`."""
    own = dict(trial.settings)
    sizes, recipe, steps = Sizes(**own.pop("sizes")), own.pop("recipe"), own.pop("steps")
    common = {"data_dir": trial.data_dir, "choosing": trial.choosing}
    task = tasks.make(own.pop("kind"), **common, **own)
    recipe = Recipe(steps=steps, lr=trial.lr, **recipe)
    torch.manual_seed(trial.seed)
    model = build(read(trial.file)[trial.mixer], task.vocab_size, sizes)
    try:
        fit(model, task.batches(trial.seed, steps), _loss, recipe, device=trial.device)
    except FloatingPointError:  # the rate is too high for this mixer
        return {"loss": float("inf")} | dict.fromkeys(task.tests, float("nan"))
    return task.score(model, trial.device, recipe.precision)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return sequence_loss(model, batch) + auxiliary_loss(model)


def study(
    names: list[str],
    settings: dict[str, dict[str, Any]],
    rates: list[float],
    seeds: list[int],
    *,
    device: str = "cpu",
    file: str = "",
    data_dir: str = "",
    workers: int = 1,
    progress: Callable[..., Any] | None = None,
    log: Path | None = None,
) -> list[tuple[Trial, dict[str, float]]]:
    """Every mixer on every task: first each learning rate once, then the best with every seed.

    Args:
        names: Of the mixers.
        settings: Of the tasks, by name; see `Trial`.
        rates: Learning rates that each mixer may choose from, for each task, by the loss on
            held-out data of a run with a seed of its own.
        seeds: Of the runs that are scored.
        device: "cpu" or "cuda".
        file: Python file with further mixers, or empty.
        data_dir: Folder with local copies of the texts.
        workers: Processes that train at once, on all GPUs in turn; 1 trains in this one. Small
            models leave a GPU idle between kernels, so that several share it well.
        progress: Wraps the trials, such as `run.progress`.
        log: File that keeps the scores of each trial when it ends; those that it holds are not run
            again. After an error, trials that were under way are waited for and kept.

    Returns:
        All trials, those that chose a rate first, with their scores.
    """
    common = {"file": file, "data_dir": data_dir, "device": device}
    pairs = [(task, name) for task in settings for name in names]

    def trial(task: str, mixer: str, lr: float, seed: int) -> Trial:
        choosing = seed == CHOICE_SEED
        own = {"settings": settings[task], "choosing": choosing}
        return Trial(task=task, mixer=mixer, lr=lr, seed=seed, **own, **common)

    choices = [trial(*pair, lr, CHOICE_SEED) for pair in pairs for lr in rates]
    with open_pool(workers) as pool:
        run = partial(run_all, run_trial, pool=pool, progress=progress, log=log)
        scored = run(choices if len(rates) > 1 else [], what="learning rates")
        best = {pair: _best(scored, *pair) if scored else rates[0] for pair in pairs}
        finals = [trial(*pair, best[pair], seed) for pair in pairs for seed in seeds]
        return scored + run(finals, what="runs")


def _best(scored: list[tuple[Trial, dict[str, float]]], task: str, mixer: str) -> float:
    own = [(s["loss"], t.lr) for t, s in scored if (t.task, t.mixer) == (task, mixer)]
    return min((loss if math.isfinite(loss) else math.inf, lr) for loss, lr in own)[1]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a mixer costs at one length."""

    length: int  # tokens of a training sequence, or tokens before the one that is decoded
    train_us: float  # forward and backward pass, microseconds a token; nan where not measured
    decode_ms: float  # one further token for each sequence of the batch
    state_bytes: float  # that each sequence keeps between two tokens, all blocks together


def costs(
    make: Make,
    sizes: Sizes,
    lengths: list[int],
    *,
    vocab_size: int = 256,
    tokens: int = 2048,
    decode_batch: int = 1,
    longest_training: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    min_seconds: float = 0.05,
) -> list[Cost]:
    """Training and decoding of one mixer against length, in the model of the comparison.

    Args:
        make: Of the mixer.
        sizes: Of the model.
        lengths: To measure at.
        vocab_size: Of the model.
        tokens: Of a training batch: sequences are as many as fit, at least one.
        decode_batch: Sequences that are decoded at once.
        longest_training: Longest sequence that is trained on; 0 for all.
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" for autocast.
        min_seconds: Of each measurement.

    Returns:
        A cost for each length; one that cannot be measured is nan. A mixer that returns no state
        has no cost of decoding.
    """
    model = build(make, vocab_size, sizes).to(device)
    found = []
    for length in lengths:
        train = float("nan")
        if not longest_training or length <= longest_training:
            rows = max(1, tokens // length)
            window = torch.randint(vocab_size, (rows, length + 1), device=device)
            ms = measure.training_latency(
                model,
                (window[:, :-1], window[:, 1:]),
                sequence_loss,
                device=device,
                precision=precision,
                min_seconds=min_seconds,
            )
            train = 1000 * ms / (rows * length)
        decode, size = _decoding(model, length, decode_batch, device, precision, min_seconds)
        found.append(Cost(length=length, train_us=train, decode_ms=decode, state_bytes=size))
    return found


@torch.no_grad()
def _decoding(
    model: Decoder, length: int, batch: int, device: str, precision: str, min_seconds: float
) -> tuple[float, float]:
    """Milliseconds for one token after `length` others, and bytes of state a sequence; nan for a
    mixer that returns no state."""
    prompt = torch.randint(model.embedding.num_embeddings, (batch, length), device=device)
    last = prompt[:, -1:]
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        states = None
        for part in prompt.split(1024, 1):  # in parts, so that a cache fits beside the work
            _, states = model.continue_from(part, states)
        if any(state is None for state in states):
            return math.nan, math.nan
        size = sum(x.numel() * x.element_size() for x in _tensors(states)) // batch
        ms = measure.latency(
            lambda: model.continue_from(last, states), device=device, min_seconds=min_seconds
        )
    return ms, size


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _tensors(part)
