"""Kills training runs, damages their checkpoints, fills the disk, and looks at what is left.

    python survival.py kill TRIALS | damage TRIALS

Prints one JSON line a trial. A trial is a forked process, so that torch is imported once; nothing
is computed in this one before, because torch's threads do not survive a fork.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import accelerate  # noqa: F401  (before forking)
import torch
import torch.distributed.checkpoint
import worker

from gatebook.training import checkpoint

STEPS, EVERY = 80, 5


def forked(
    work: Callable[[], object], out: Path, until: Callable[[], bool] | None = None, more: float = 0
) -> int:
    """Run `work` in a process of its own, its result as JSON in `out`.

    With `until`, it is killed `more` seconds after that came true.

    Returns:
        The exit status, or minus the signal.
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        found, status = {}, 1
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                found["result"] = work()
            status = 0
        except BaseException as error:
            found["error"] = f"{type(error).__name__}: {error}"
        finally:
            found["said"] = [str(w.message) for w in heard if "checkpoint" in str(w.message)]
            out.write_text(json.dumps(found))
            os._exit(status)
    if until:
        while not until():
            if (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
                return os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.001)
        time.sleep(more)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if not path.suffix)


def _has_reached(folder: Path, step: int) -> bool:
    return step == 0 or (folder / f"step-{step:08d}").exists()


def kill(trials: int, at: Path, whole: list[float], seconds: float) -> None:
    """SIGKILL at a random moment, resume, compare with the run that was left alone.

    The moment is some time after a random checkpoint, up to what as many steps take: a time after
    the start would fall behind the end when other processes leave the machine.
    """
    for trial in range(trials):
        folder, out, rng = at / f"kill-{trial}", at / "out.json", random.Random(trial)
        begun = EVERY * rng.randrange(11)
        until = partial(_has_reached, folder, begun)
        more = rng.uniform(0, EVERY) * seconds / STEPS
        run = partial(worker.train, folder, STEPS, checkpoint_every=EVERY)
        status = forked(run, out, until, more)
        left = steps_in(folder)
        first = left[-1] if left else 0
        last = min(STEPS, first + 20)
        forked(lambda f=folder, n=last: worker.train(f, n, resume=True), out)
        losses = json.loads(out.read_text()).get("result")
        print(
            json.dumps(
                {
                    "killed": status == -signal.SIGKILL,
                    "resumed_from": first,
                    "steps": last - first,
                    "bit_equal": losses == whole[first:last],
                }
            ),
            flush=True,
        )
        shutil.rmtree(folder, ignore_errors=True)


def truncate(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def full_disk(limit: int) -> None:
    """From here on no file may grow beyond `limit` bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def damage(trials: int, at: Path, whole: list[float]) -> None:
    """The newest checkpoint truncated or with a wrong bit, or a disk that fills while it is
    written; in turn. Then the run is resumed, with room on the disk."""
    made = at / "made"
    forked(lambda: worker.train(made, 20, checkpoint_every=10), at / "out.json")
    for trial in range(trials):
        rng, folder, out = random.Random(trial), at / f"damage-{trial}", at / "out.json"
        kind = ("truncated", "flipped", "full")[trial % 3]
        shutil.copytree(made, folder)
        filled: dict = {}
        if kind == "full":  # neither step 30 nor the last, 35, can be written
            size = max(p.stat().st_size for p in (folder / "step-00000020").iterdir())
            limit = rng.randrange(1, size)

            def work(folder: Path = folder, limit: int = limit) -> list[float]:
                full_disk(limit)
                return worker.train(folder, 35, resume=True, checkpoint_every=10)

            forked(work, out)
            filled = json.loads(out.read_text())
        else:
            files = sorted((folder / "step-00000020").iterdir())
            (truncate if kind == "truncated" else flip)(rng.choice(files), rng)
        left, partial = steps_in(folder), list(folder.glob("*.partial"))
        first = 20 if kind == "full" else 10
        forked(lambda f=folder, n=first + 20: worker.train(f, n, resume=True), out)
        found = json.loads(out.read_text())
        print(
            json.dumps(
                {
                    "kind": kind,
                    "error_when_full": filled.get("error"),
                    "said_when_full": filled.get("said"),
                    "error": found.get("error"),
                    "bit_equal": found.get("result") == whole[first : first + 20],
                    "said": found.get("said"),
                    "older_kept": left == [10, 20],
                    "older_whole": checkpoint.damage(folder / "step-00000010") is None,
                    "partial_left": bool(partial),
                }
            ),
            flush=True,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        at, out = Path(name), Path(name) / "out.json"
        forked(lambda: worker.train(at / "warm", 2), out)
        start = time.perf_counter()
        forked(lambda: worker.train(at / "whole", STEPS, checkpoint_every=EVERY), out)
        seconds = time.perf_counter() - start
        whole = json.loads(out.read_text())["result"]
        if sys.argv[1] == "kill":
            kill(int(sys.argv[2]), at, whole, seconds)
        else:
            damage(int(sys.argv[2]), at, whole)
