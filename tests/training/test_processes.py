"""Two and three processes train what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gatebook.training import Recipe, fit, parallel

SCRIPT = Path(__file__).with_name("worker.py")


def run(folder: Path, processes: int, *words: str) -> list[float]:
    """Losses of the first process of a launch."""
    out = folder.with_name(f"{folder.name}.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), SCRIPT, folder, out, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(tmp_path_factory.mktemp("alone") / "run", 1)


def assert_close(found: list[float], expected: list[float], relative: float) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=relative)


@pytest.mark.parametrize(
    ("processes", "strategy"), [(2, "ddp"), (2, "fsdp"), (3, "ddp"), (3, "fsdp")]
)
def test_losses_are_those_of_one_process(tmp_path, alone, processes, strategy):
    assert alone[-1] < 0.98 * alone[0]
    assert_close(run(tmp_path / "run", processes, "--strategy", strategy), alone, 1e-6)


def test_recomputed_activations_change_nothing(tmp_path, alone):
    assert run(tmp_path / "run", 1, "--recompute") == alone
    assert_close(run(tmp_path / "two", 2, "--recompute", "--strategy", "fsdp"), alone, 1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_may_move_from_one_process_to_two_and_back(tmp_path, alone, strategy):
    folder = tmp_path / "run"
    more = ("--every", "7", "--resume")
    losses = run(folder, 1, "--steps", "7", *more)
    losses += run(folder, 2, "--steps", "14", "--strategy", strategy, *more)
    losses += run(folder, 1, "--steps", "20", *more)
    assert_close(losses, alone, 1e-6)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in (7, 14, 20)]


def test_sharding_without_a_launcher_says_what_to_do():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="needs a launcher such as torchrun"):
        fit(model, [], lambda m, x: m(x).mean(), Recipe(steps=1, lr=1e-3), strategy="fsdp")
    with pytest.raises(ValueError, match="strategy"):
        fit(model, [], lambda m, x: m(x).mean(), Recipe(steps=1, lr=1e-3), strategy="zero")


def test_blocks_are_the_members_of_module_lists():
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]), nn.ReLU()])
    model = nn.Sequential(nn.Linear(1, 1), inner)
    assert parallel.blocks(model) == [inner[0][0], inner[0][1], inner[1]]
    alone = nn.Linear(1, 1)
    assert parallel.blocks(alone) == [alone]


def test_recompute_leaves_no_trace():
    model = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    parallel.recompute(model)
    assert "forward" in vars(model[0][0])
    parallel.keep_activations(model)
    assert "forward" not in vars(model[0][0])
    assert torch.is_tensor(model[0][0](torch.ones(1)))
