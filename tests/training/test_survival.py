"""Runs that are killed, and checkpoints that are damaged, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("survival.py")


def trials(kind: str, count: int) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, str(count)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_killed_run_goes_on_as_if_nothing_had_happened():
    found = trials("kill", 20)
    assert len(found) == 20
    assert all(trial["bit_equal"] and trial["steps"] == 20 for trial in found)
    assert all(trial["killed"] for trial in found)
    assert len({trial["resumed_from"] for trial in found}) > 3


@pytest.fixture(scope="module")
def damaged() -> list[dict]:
    return trials("damage", 30)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "full"])
def test_damage_costs_the_newest_checkpoint_only(damaged, kind):
    found = [trial for trial in damaged if trial["kind"] == kind]
    assert len(found) == 10
    for trial in found:
        assert trial["error"] is None
        assert trial["bit_equal"], trial
        assert trial["older_kept"]
        assert trial["older_whole"]
        assert not trial["partial_left"]
        if kind == "full":  # one in the middle is missed with a warning, the last one is an error
            assert trial["said"] == []
            (said,) = trial["said_when_full"]
            assert "step-00000030 could not be written" in said
            assert "step-00000035 could not be written" in trial["error_when_full"]
        else:
            (said,) = trial["said"]
            assert "is damaged" in said
