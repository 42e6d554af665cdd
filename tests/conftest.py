"""Fixtures that more than one test module uses."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch copy of the book's data (chapters, results, table of contents), entered."""
    for name in ("chapters", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "_toc.yml", tmp_path)
    shutil.copy(ROOT / "book/references.bib", tmp_path / "book")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chapter_fields(**changes: Any) -> dict[str, Any]:
    """A small valid chapter, as the fields of a `.yml`."""
    test = {
        "id": "method-wins",
        "scales": ["small"],
        "metric": "accuracy",
        "unit": "fraction",
        "left": "method",
        "right": "baseline",
        "statistic": "difference",
        "direction": "greater",
        "margin": 0.1,
        "rationale": "the paper's gain is 0.2; half of it counts",
    }
    claim = {
        "id": "C1",
        "statement": "The method beats the baseline.",
        "where": "Table 1",
        "paper": "0.9 against 0.7",
        "tests": [test],
    }
    plan = {
        "description": "a toy",
        "dataset": "generated",
        "device": "cpu",
        "seeds": 3,
        "settings": {"steps": 1},
    }
    return {
        "slug": "toy",
        "title": "A Toy",
        "authors": ["A. Author"],
        "year": 2024,
        "arxiv": "2401.00001",
        "venue": "arXiv",
        "code": [],
        "part": "Vision backbones",
        "claims": [claim],
        "scales": {"small": plan, "medium": plan, "full": plan},
        "ambiguities": [],
    } | changes


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until a condition holds; what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def logged(folder: str | Path) -> list[float]:
    """The losses in a job's log, as far as it goes."""
    from gatebook.training.metrics import logged_losses

    path = Path(folder) / "log.jsonl"
    return logged_losses(path) if path.is_file() else []
