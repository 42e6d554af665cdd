"""`gatebook new` as CONTRIBUTING tells it: it runs at once and is refused until it is filled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A copy of the checkout with a scaffolded chapter `gtrxl`."""
    target = tmp_path_factory.mktemp("checkout")
    shutil.copytree(root / "lib", target / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("chapters", "tests/models"):
        (target / name).mkdir(parents=True)
    shutil.copytree(root / "book", target / "book", ignore=shutil.ignore_patterns("_static"))
    shutil.copy(root / "_toc.yml", target)
    done = _gatebook(target, "new", "gtrxl")
    assert done.returncode == 0, done.stderr
    return target


def _gatebook(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from gatebook.cli import main; main()", *words],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout / "lib"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_touches_six_files(checkout: Path, root: Path) -> None:
    for name in (
        "chapters/gtrxl.yml",
        "chapters/gtrxl.ipynb",
        "lib/gatebook/models/gtrxl.py",
        "tests/models/test_gtrxl.py",
    ):
        assert (checkout / name).is_file()
    toc = yaml.safe_load((checkout / "_toc.yml").read_text())
    found = next(
        part for part in toc["parts"] if part.get("caption") == "Sound, images with text, control"
    )
    assert {"file": "chapters/gtrxl"} in found["chapters"]
    lines = (checkout / "_toc.yml").read_text().splitlines()
    lines.remove("  - file: chapters/gtrxl")
    assert lines == (root / "_toc.yml").read_text().splitlines()  # one line, and no other changes
    assert re.search(r"@\w+\{gtrxl,", (checkout / "book/references.bib").read_text())


def test_its_own_test_passes(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/models/test_gtrxl.py"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout / "lib")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout


def test_it_runs_records_and_is_refused_until_it_is_filled(checkout: Path) -> None:
    done = _gatebook(checkout, "run", "gtrxl", "--update")
    assert done.returncode == 0, done.stderr
    assert (checkout / "results/gtrxl/small.json").is_file()
    refused = _gatebook(checkout, "verify", "gtrxl")
    assert refused.returncode == 1
    assert "'FILL IN' left to replace" in refused.stdout
    notebook = checkout / "chapters/gtrxl.ipynb"
    model = checkout / "lib/gatebook/models/gtrxl.py"
    for path in (notebook, notebook.with_suffix(".yml"), model):
        path.write_text(path.read_text().replace("FILL IN", "Filled"))
    assert _gatebook(checkout, "run", "gtrxl", "--update").returncode == 0
    accepted = _gatebook(checkout, "verify", "gtrxl")
    assert accepted.stdout == "1 chapter(s) checked, 0 fault(s)\n"


def test_a_second_scaffold_and_a_bad_slug_are_refused(checkout: Path) -> None:
    again = _gatebook(checkout, "new", "gtrxl")
    assert again.returncode == 1
    assert "exists already; nothing was written" in again.stderr
    assert "lower-case words" in _gatebook(checkout, "new", "S V T").stderr
