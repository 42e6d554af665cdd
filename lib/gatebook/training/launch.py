"""Start the processes of a job: on this machine, or each on a host of its own.

`launch` is what a notebook calls. To use several hosts without Slurm, write the job with
`write_job` into a folder that they share, and start on each of them

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        --shutdown-timeout 600 -m gatebook.training.launch JOB.json

with the name of one of them as HOST. On SIGTERM or SIGINT all processes write a checkpoint within
`log_every` steps and end; started again, on any number of GPUs, the job goes on from there.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gatebook.errors import unknown
from gatebook.evidence import provenance
from gatebook.training import jobs
from gatebook.training.fit import History
from gatebook.training.jobs import Job
from gatebook.training.metrics import Log, Work
from gatebook.training.tasks import Task

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class WorkerError(RuntimeError):
    """A process failed; the message holds its own error and names its log file."""


def launch(
    job: Job, *, gpus: int = 1, progress: Callable[..., Iterable[int]] | None = None
) -> History:
    """Train a job on this machine, and wait for it.

    It continues from the newest checkpoint in the job's folder. The first SIGTERM or SIGINT (the
    stop button of a notebook) makes it write a checkpoint and return; a second one ends it at once.
    With several processes a script calls it under `if __name__ == "__main__":`.

    Args:
        job: What to train.
        gpus: Processes, each on a GPU of its own, or on the CPU if the job's device is that.
        progress: As for `fit`. With several processes it moves when they log, each `log_every`
            steps; what they print is in `logs/` in the job's folder.

    Returns:
        Losses and seconds of this call, and whether it was stopped.

    Raises:
        ValueError: An impossible number of GPUs, or a job that cannot be built.
        WorkerError: One of several processes failed. One process raises what `jobs.train` raises.
    """
    there = torch.cuda.device_count()
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}, but must be at least 1")
    if (job.device == "cuda" or (job.device == "auto" and there)) and gpus > there:
        raise ValueError(f"gpus is {gpus}, but this machine has {there}")
    if gpus > 1:
        return _launch_several(job, gpus, progress)
    with noted(*SIGNALS, again=False) as arrived:
        return jobs.train(job, progress=progress, stop=lambda: bool(arrived))


def write_job(job: Job, path: str | Path) -> None:
    """Write a job as JSON."""
    Path(path).write_text(json.dumps(asdict(job), indent=1) + "\n", encoding="utf-8")


def read_job(path: str | Path) -> Job:
    """Read the job that `write_job` wrote. Fields that have defaults may be left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no JSON object, or a field is unknown, missing or of another type.
    """
    text = Path(path).read_text(encoding="utf-8")
    allowed = [field.name for field in fields(Job)]
    try:
        for name in json.loads(text):
            if name not in allowed:
                raise ValueError(unknown("field of a job", name, allowed))
        return TypeAdapter(Job).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the job"
        raise ValueError(f"{path}: {where}: {first['msg']}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def noted(*numbers: int, again: bool = True) -> Iterator[list[int]]:
    """Put signals into a list instead of their usual effect; with `again=False` the first only."""
    arrived: list[int] = []
    usual = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        arrived.append(number)
        if not again:
            restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield arrived
    finally:
        restore()


def _launch_several(job: Job, gpus: int, progress: Callable[..., Iterable[int]] | None) -> History:
    task = jobs.build(job, processes=gpus)
    folder = job.path(provenance.root())
    folder.mkdir(parents=True, exist_ok=True)
    stop = multiprocessing.get_context("spawn").Event()
    others = set(multiprocessing.active_children())
    # workers inherit the mask: what comes before their handlers are there, waits
    masked = {"initializer": signal.pthread_sigmask, "initargs": (signal.SIG_BLOCK, SIGNALS)}
    with noted(*SIGNALS, again=False) as arrived, ThreadPoolExecutor(1, **masked) as thread:
        log = _lines(folder / "log.jsonl")
        start = elastic_launch(_config(folder / "logs", gpus), _work)
        run = thread.submit(start, asdict(job), stop)
        try:
            words = Log(None, None, Work(unit=task.unit, per_step=0), main=False)
            steps = range(_steps_done(task, folder), task.steps)
            bar = iter(progress(steps, words.words) if progress else ())
            ended = False
            while not ended:
                ended = run.done()
                for words.last in log():
                    deque(islice(bar, job.log_every), maxlen=0)
                if arrived:
                    stop.set()
                time.sleep(0.2)
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        try:
            return run.result()[0]
        except ChildFailedError as error:
            raise _first_failure(folder / "logs", error) from None


def _config(logs: Path, gpus: int) -> LaunchConfig:
    """Processes on this host alone, that write to files; their failures are raised, not printed."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        run_id=time.strftime("%Y%m%d-%H%M%S"),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )


def _lines(path: Path) -> Callable[[], Iterator[dict[str, Any]]]:
    """A function that gives the lines added to a log since it was last called."""
    path.touch()
    place = path.stat().st_size

    def added() -> Iterator[dict[str, Any]]:
        nonlocal place
        with path.open("rb") as file:
            file.seek(place)
            for line in file:
                if line.endswith(b"\n"):  # written whole
                    place += len(line)
                    yield json.loads(line)

    return added


def _steps_done(task: Task, folder: Path) -> int:
    """Optimiser steps up to the newest checkpoint."""
    for stage in reversed(range(len(task.recipes))):
        found = sorted((folder / f"stage-{stage}").glob("step-????????"))
        if found:
            before = sum(recipe.steps for recipe in task.recipes[:stage])
            return before + int(found[-1].name.removeprefix("step-"))
    return 0


def _first_failure(logs: Path, error: ChildFailedError) -> WorkerError:
    """The error of the process that failed first; the others fail because it is gone."""
    rank, failure = error.get_first_failure()
    attempt = max(logs.iterdir(), key=lambda folder: folder.stat().st_ctime_ns) / "attempt_0"
    message = failure.message
    reports = sorted(attempt.glob("*/error.json"), key=lambda file: file.stat().st_mtime_ns)
    if reports and failure.exitcode >= 0:  # not killed
        rank = int(reports[0].parent.name)
        message = json.loads(reports[0].read_text())["message"]["message"]
    return WorkerError(f"process {rank} failed: {message} (log: {attempt}/{rank}/stderr.log)")


def _work(job: dict[str, Any], stop: Any) -> History:
    """What each process that `launch` starts does."""
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        history = _train(Job(**job), stop.is_set)
    except Exception:
        traceback.print_exc()  # into the log file
        raise
    if not multiprocessing.parent_process().is_alive():
        os._exit(0)  # torch would wait for it
    return history


def _train(job: Job, stop: Callable[[], bool]) -> History:
    """Train as one of several processes, until a signal comes or `stop()`."""
    arrived: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: arrived.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    history = jobs.train(job, stop=lambda: bool(arrived) or stop())
    if dist.is_initialized():
        dist.destroy_process_group()
    return history


@record
def main() -> None:
    """What each process that `torchrun` starts does."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: torchrun … -m gatebook.training.launch JOB.json")
    history = _train(read_job(sys.argv[1]), lambda: False)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(history.loss)} steps, {'stopped' if history.stopped else 'done'}")


if __name__ == "__main__":
    main()
