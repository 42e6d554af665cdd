"""Trials in a pool; what they have to do with mixers is tested there."""

import multiprocessing
import os
from dataclasses import dataclass

import pytest
import torch

from gatebook.training import trials


@dataclass(frozen=True)
class Sum:
    """Adds two numbers."""

    a: int
    b: int


def add(trial: Sum) -> dict[str, float]:
    return {"sum": trial.a + trial.b}


def broken(trial: Sum) -> dict[str, float]:
    if trial.a == 1:
        raise ValueError("no ones")
    return add(trial)


def test_workers_take_the_gpus_in_turn(monkeypatch):
    taken = multiprocessing.Value("i", 0)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
        trials._begin(taken, ["2", "5"])
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "5", "2"]


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_come_back_in_their_order(workers, tmp_path):
    given = [Sum(a, 10) for a in range(5)]
    seen = []

    def progress(items, what):
        assert what == "sums"
        assert len(items) == 5
        for item in items:
            seen.append(item)
            yield item

    with trials.open_pool(workers) as pool:
        found = trials.run_all(add, given, pool=pool, progress=progress, what="sums")
    assert found == [(Sum(a, 10), {"sum": a + 10}) for a in range(5)]
    assert len(seen) == 5


def threads(trial: Sum) -> dict[str, float]:
    return {"threads": torch.get_num_threads()}


def test_workers_keep_to_one_thread(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with trials.open_pool(2) as pool:
        found = trials.run_all(threads, [Sum(0, 0), Sum(1, 1)], pool=pool)
    assert [scores["threads"] for _, scores in found] == [1, 1]


def test_an_error_here_names_nothing_but_keeps_what_was_done(tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(ValueError, match="no ones"):
        trials.run_all(broken, [Sum(0, 0), Sum(1, 0), Sum(2, 0)], log=log)
    assert trials.run_all(add, [Sum(0, 0)], log=log) == [(Sum(0, 0), {"sum": 0})]
    assert log.read_text().count("sum") == 1
