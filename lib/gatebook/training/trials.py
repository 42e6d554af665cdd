"""Many small trainings, one after another or several at once, kept as they end.

A trial is a frozen dataclass of plain data that says what to train; its `str` names it in messages.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

Trial = Any
Scores = dict[str, float]


@contextmanager
def open_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that run trials, on all GPUs in turn; None for one worker, which is this process.

    Small models leave a GPU idle between kernels, so that several workers share it well.
    """
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # CUDA cannot fork
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(number) for number in range(torch.cuda.device_count())]
    pool = ProcessPoolExecutor(workers, context, _begin, (context.Value("i", 0), gpus))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(taken: Any, gpus: list[str]) -> None:
    """Let a new worker see one GPU, each the next, and keep to one thread beside the others."""
    torch.set_num_threads(1)
    with taken.get_lock():
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[taken.value % len(gpus)]
        taken.value += 1


def run_all(
    run_trial: Callable[[Trial], Scores],
    trials: list[Trial],
    *,
    pool: ProcessPoolExecutor | None = None,
    progress: Callable[..., Any] | None = None,
    log: Path | None = None,
    what: str = "runs",
) -> list[tuple[Trial, Scores]]:
    """Run trials, here or in a pool.

    Args:
        run_trial: Trains and scores one; a function of a module, so that a process can find it.
        trials: Frozen dataclasses that JSON can hold.
        pool: Of `open_pool`; None runs them here, in order.
        progress: Wraps the trials, such as `run.progress`.
        log: File that keeps the scores of each trial when it ends; those that it holds are not run
            again.
        what: Words for the progress.

    Returns:
        The trials in their order, with their scores.

    Raises:
        Exception: Whatever a trial raised, after those under way have ended and were kept.
    """
    done = {} if log is None else _logged(log)
    left = [trial for trial in trials if _key(trial) not in done]
    ended = _Sized(_ended(run_trial, left, pool), len(left))
    for trial, scores in progress(ended, what) if progress and left else ended:
        done[_key(trial)] = scores
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write("\n" + json.dumps({"trial": asdict(trial), "scores": scores}))
    return [(trial, done[_key(trial)]) for trial in trials]


def _key(trial: Trial) -> str:
    return json.dumps(asdict(trial), sort_keys=True)


def _logged(log: Path) -> dict[str, dict[str, float]]:
    """Scores by trial; empty lines, and one that a killed run left half written, do not count."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[json.dumps(entry["trial"], sort_keys=True)] = entry["scores"]
    return found


def _ended(
    run_trial: Callable[[Trial], Scores], trials: list[Trial], pool: ProcessPoolExecutor | None
) -> Iterator[tuple[Trial, Scores]]:
    """Trials and their scores, as they end."""
    if pool is None:
        for trial in trials:
            yield trial, run_trial(trial)
        return
    futures = {pool.submit(run_trial, trial): trial for trial in trials}
    failure = None
    for future in as_completed(futures):
        if future.cancelled():
            continue
        if (error := future.exception()) is None:
            yield futures[future], future.result()
        elif failure is None:
            failure = error
            failure.add_note(f"in the run of {futures[future]}")
            for other in futures:
                other.cancel()  # what has begun goes on
    if failure is not None:
        raise failure


class _Sized:
    """Items whose number is known before they are, for a progress bar."""

    def __init__(self, items: Iterator, count: int) -> None:
        self.items, self.count = items, count

    def __iter__(self) -> Iterator:
        return self.items

    def __len__(self) -> int:
        return self.count
