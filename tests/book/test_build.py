"""What the build must give beside pages that load."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from gatebook.book.papers import entries, papers
from gatebook.book.sphinxext import escape_markup, public_modules
from gatebook.evidence import ledger

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 2
API = {"kernels", "layers", "mixers", "backbones", "models", "data", "training", "measure"}
API |= {"evidence"}


def test_build_passes_without_a_network(build: subprocess.CompletedProcess[str]) -> None:
    assert build.returncode == 0, (build.stdout + build.stderr)[-4000:]


def test_download_is_the_ledger(html: Path) -> None:
    text = (html / "book" / "scoreboard.tsv").read_text("utf-8")
    assert text == ledger.tsv(ledger.rows(ROOT))


def test_scoreboard_shows_every_paper_and_claim(html: Path) -> None:
    page = (html / "book" / "scoreboard.html").read_text("utf-8")
    for paper in papers():
        assert f'id="{paper.slug}"' in page
    for row in ledger.rows(ROOT):
        assert f'id="{row["chapter"]}-{row["claim"]}"' in page


def test_every_chapter_is_in_the_table_of_contents() -> None:
    toc = (ROOT / "_toc.yml").read_text("utf-8")
    listed = set(re.findall(r"chapters/([a-z0-9-]+)", toc))
    assert listed == {path.stem for path in (ROOT / "chapters").glob("*.ipynb")}


def test_table_of_contents_follows_the_reading_order() -> None:
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))["parts"]
    listed = [
        (part["caption"], entry["file"].removeprefix("chapters/"))
        for part in parts
        for entry in part["chapters"]
        if entry["file"].startswith("chapters/")
    ]
    order = [(entry.part, entry.slug) for entry in entries()]
    assert listed == [entry for entry in order if entry in listed]


@pytest.mark.parametrize("package", sorted(API))
def test_api_page_names_every_public_module(html: Path, package: str) -> None:
    page = (html / "book" / "api" / f"{package}.html").read_text("utf-8")
    for name in public_modules(f"gatebook.{package}"):
        assert f'id="module-{name}"' in page or f"{name}<a" in page


def test_vendored_files_are_small_and_licensed() -> None:
    static = ROOT / "book" / "_static"
    sizes = {path: path.stat().st_size for path in static.rglob("*") if path.is_file()}
    assert {p.name for p, size in sizes.items() if size > MEGABYTES * 2**20} == set()
    assert "Apache License" in (static / "mathjax" / "LICENSE").read_text("utf-8")


def test_public_repository_is_named_in_one_place() -> None:
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
    folders = (".", "book", "book/api", "chapters", ".github/workflows")
    files = [path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()]
    naming = {p.name for p in files if p.suffix != ".png" and url in p.read_text("utf-8", "ignore")}
    assert naming == {"_config.yml"}


@pytest.mark.parametrize(
    ("docstring", "escaped"),
    [
        ("|g_C| · 6e-8", r"\|g_C\| · 6e-8"),
        ("a * b ** c", r"a \* b \*\* c"),
        ("* item\n* item", "* item\n* item"),
        ("`a * b` and ``x_``", "`a * b` and ``x_``"),
        ("the gate g_ and S_t", r"the gate g\_ and S_t"),
        (r"already \* done", r"already \* done"),
    ],
)
def test_formulas_in_docstrings_are_not_markup(docstring: str, escaped: str) -> None:
    assert escape_markup(docstring) == escaped
