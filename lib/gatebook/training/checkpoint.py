"""Checkpoints that survive: written whole or not at all, verified by checksum, resharded on load.

A checkpoint is a folder `step-N` with the model and the optimiser in the format of
`torch.distributed.checkpoint`, which any number of processes can read, one file a process with its
random states and its place in the data, and `manifest.json` with the SHA-256 of all others.
"""

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or none can be read; the message says which and why."""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any = None,
    *,
    keep: int = 3,
) -> Path:
    """Write checkpoint `step` under another name, verify nothing is missing, then rename it.

    Every process calls it. Afterwards the newest `keep` checkpoints are left.

    Args:
        folder: Folder of the checkpoints of one run.
        step: Optimiser steps done.
        model: Plain, in DDP, or sharded by FSDP2.
        optimizer: Of that model.
        batches: Data with a `state_dict`, or None.
        keep: Number of checkpoints that are kept, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: A file could not be written on some process (a full disk, say). What was
            there before is there still, and the unfinished one is gone.
    """
    final = Path(folder) / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    _on_main(lambda: _fresh(partial), f"{final.name} could not be begun")

    def write() -> None:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only, and torch's own
            dcp.save(state, checkpoint_id=str(partial))
        own = {"random": random_states(), "batches": _state(batches)}
        torch.save(own, partial / f"rank-{_rank():05d}.pt")

    def finish() -> None:
        _write_manifest(partial, step)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(final.parent)
        for old in _found(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)

    try:
        _everywhere(write, f"{final.name} could not be written")
        _on_main(finish, f"{final.name} could not be finished")
    except CheckpointError:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def restore(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any = None
) -> int:
    """Load the newest checkpoint that is whole. Every process calls it.

    With as many processes as wrote it, model, optimiser, random states and place in the data are
    exactly those. With another number, model and optimiser are resharded, the data's states are
    merged (`batches.merge_states`), and a process that had none takes fresh random states.

    Returns:
        Optimiser steps done; 0 if there is no checkpoint.

    Raises:
        CheckpointError: There are checkpoints, but all of them are damaged.
    """
    path = _shared(_newest_whole(folder) if _rank() == 0 else None)
    if path is None:
        return 0
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=str(path))
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    step = json.loads((path / MANIFEST).read_text())["step"]
    files = sorted(path.glob("rank-*.pt"))
    saved = [torch.load(file, weights_only=True) for file in files]
    if _rank() < len(saved):
        set_random_states(saved[_rank()]["random"])
    else:
        torch.manual_seed(torch.initial_seed() + 1000 * _rank() + step)
    if has_state(batches):
        states = [part["batches"] for part in saved]
        same = len(saved) == _world()
        batches.load_state_dict(states[_rank()] if same else _merged(batches, states))
    return step


def has_state(batches: Any) -> bool:
    """Whether data can say and set their place."""
    return hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random numbers on this process."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Continue where `random_states` was taken."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _newest_whole(folder: str | Path) -> Path | CheckpointError | None:
    found = _found(folder)
    for path in found:
        fault = damage(path)
        if fault is None:
            return path
        warnings.warn(
            f"checkpoint {path.name} is damaged ({fault}); trying the one before it", stacklevel=2
        )
    if found:
        names = ", ".join(path.name for path in found)
        return CheckpointError(
            f"every checkpoint in {folder} is damaged ({names}). Move them away to start anew"
        )
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's folder; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, own = manifest["files"], manifest.pop("checksum")
        if own != _checksum_of(manifest) or path.name != f"step-{manifest['step']:08d}":
            return f"{MANIFEST} is not as it was written"
        for name, checksum in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != checksum:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    return None


def _found(folder: str | Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in Path(folder).glob("step-*") if not p.suffix), reverse=True)


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_manifest(path: Path, step: int) -> None:
    files = {p.name: _sha256(p) for p in sorted(path.iterdir())}
    for name in files:
        _sync(path / name)
    manifest: dict[str, Any] = {"step": step, "processes": _world(), "files": files}
    text = json.dumps(manifest | {"checksum": _checksum_of(manifest)}, indent=1)
    (path / MANIFEST).write_text(text)
    _sync(path / MANIFEST)
    _sync(path)


def _checksum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _state(batches: Any) -> Any:
    return batches.state_dict() if has_state(batches) else None


def _merged(batches: Any, states: list[Any]) -> Any:
    if not hasattr(batches, "merge_states"):
        raise CheckpointError(
            f"{type(batches).__name__} cannot merge the places of {len(states)} processes; resume "
            "with as many"
        )
    return batches.merge_states(states)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _shared(value: Any) -> Any:
    """What the first process has, on all; an exception is raised on all."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def _on_main(work: Callable[[], None], what: str) -> None:
    """Work on the first process; its failure is every process's."""
    _shared(_attempt(work, what) if _rank() == 0 else None)


def _everywhere(work: Callable[[], None], what: str) -> None:
    """Work on every process; one's failure is all's."""
    faults = [None] * _world()
    fault = _attempt(work, what)
    if dist.is_initialized():
        dist.all_gather_object(faults, fault)
    else:
        faults = [fault]
    for fault in faults:
        if fault is not None:
            raise fault


def _attempt(work: Callable[[], None], what: str) -> CheckpointError | None:
    try:
        work()
    except (Exception, CheckpointException) as error:  # torch's own is a BaseException
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return CheckpointError(f"checkpoint {what}: {lines[-1].strip()} ({type(error).__name__})")
    return None
