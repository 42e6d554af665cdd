"""Every chapter passes the gates, and each gate catches the fault that it is there for."""

import copy as copies
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gatebook import gates, scaffold
from gatebook.evidence import ledger

ROOT = Path(__file__).resolve().parents[2]
SLUGS = ledger.chapters(ROOT)
Notebook = dict[str, Any]


@pytest.mark.parametrize("slug", SLUGS)
def test_chapter_has_no_fault(slug: str) -> None:
    assert gates.check_chapter(ROOT, slug) == []


@pytest.mark.parametrize("slug", SLUGS)
def test_chapter_is_listed_in_the_contents_and_the_references(slug: str) -> None:
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    assert f"chapters/{slug}" in [entry["file"] for part in parts for entry in part["chapters"]]
    listed = re.search(rf"@\w+\{{{slug},", (ROOT / "book/references.bib").read_text())
    assert bool(listed) == bool(ledger.load_chapter(ROOT, slug).arxiv)  # a comparison has no paper


@pytest.mark.parametrize("slug", SLUGS)
def test_effect_tests_have_three_seeds(slug: str) -> None:
    chapter = ledger.load_chapter(ROOT, slug)
    for scale in ("small", "medium"):
        if any(test.by_chance for test in chapter.tests(scale)):
            assert chapter.scales[scale].seeds >= 3


@pytest.mark.parametrize("slug", SLUGS)
def test_parameters_cells_agree(slug: str) -> None:
    from gatebook import runner

    defaults = runner.default_parameters(ROOT, slug)
    shared = {name: defaults[name] for name in gates.PARAMETERS}
    assert shared == {
        "scale": "small",
        "seed": 0,
        "device": "auto",
        "max_steps": 0,
        "data_dir": "",
        "gpus": 1,
        "strategy": "ddp",
        "confirm": False,
        "record": False,
    }


@pytest.fixture(scope="module")
def good() -> Notebook:
    """A notebook without a fault: the scaffold's, executed by hand."""
    notebook = json.loads(scaffold.notebook_of("svt"))
    for count, cell in enumerate(_code(notebook), 1):
        cell |= {"execution_count": count, "outputs": [_print("as printed")]}
    return notebook


def _code(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _prose(notebook: Notebook) -> dict[str, Any]:
    return next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def _faults(folder: Path, notebook: Notebook) -> list[str]:
    path = folder / "svt.ipynb"
    path.write_text(json.dumps(notebook))
    return gates.check_notebook(path, {"C1"})


def _print(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": [text]}


def _error(name: str) -> dict[str, Any]:
    return {"output_type": "error", "ename": name, "evalue": "", "traceback": []}


PLANTS: dict[str, tuple[Callable[[Notebook], Any], str]] = {
    "stripped outputs": (
        lambda nb: _code(nb)[2].update(execution_count=None, outputs=[]),
        "outputs were stripped",
    ),
    "emptied figure": (
        lambda nb: _code(nb)[3].update(source="plotting.show(fig, alt='', caption='')", outputs=[]),
        "code cell 4 calls plotting.show, but stores no output",
    ),
    "emptied claims": (
        lambda nb: _code(nb)[3].update(source="x = 1\nrun.claims()", outputs=[]),
        "code cell 4 calls run.claims, but stores no output",
    ),
    "emptied verdicts": (
        lambda nb: _code(nb)[3].update(source="run.verdicts()", outputs=[]),
        "code cell 4 calls run.verdicts, but stores no output",
    ),
    "emptied print": (
        lambda nb: _code(nb)[3].update(source="if x:\n    y = 1\nprint(x)", outputs=[]),
        "code cell 4 calls print, but stores no output",
    ),
    "stored error": (
        lambda nb: _code(nb)[2]["outputs"].append(_error("KeyError")),
        "stores an error: KeyError",
    ),
    "stderr noise": (
        lambda nb: _code(nb)[2]["outputs"].append(_print("UserWarning", "stderr")),
        "stderr noise",
    ),
    "absolute path": (
        lambda nb: _code(nb)[2]["outputs"].append(_print("saved to /home/ada/book/out.png")),
        "absolute path: /home/ada/book/out.png",
    ),
    "absolute path on Windows": (
        lambda nb: _code(nb)[2]["outputs"].append(_print("saved to C:\\Users\\ada\\out.png")),
        "absolute path: C:",
    ),
    "no parameters tag": (
        lambda nb: _code(nb)[0]["metadata"].update(tags=[]),
        "0 cells are tagged `parameters`",
    ),
    "a parameter too many": (
        lambda nb: _code(nb)[0].update(source="".join(_code(nb)[0]["source"]) + "\nlr = 1  # rate"),
        "the parameters cell sets",
    ),
    "unknown claim id": (
        lambda nb: _prose(nb).update(source="As C7 says, it works."),
        "the claim C7, which the .yml does not have",
    ),
    "verdict typed by hand in prose": (
        lambda nb: _prose(nb).update(source="C1: **supported** at small."),
        "a verdict typed by hand",
    ),
    "verdict typed by hand in a table": (
        lambda nb: _prose(nb).update(source="| C1 | Contradicted |"),
        "a verdict typed by hand",
    ),
    "verdict typed by hand in code": (
        lambda nb: _code(nb)[3].update(source="print('C1', 'reproduced')"),
        "a verdict typed by hand in code",
    ),
    "a long cell": (
        lambda nb: _code(nb)[3].update(source="\n".join(["x = 1"] * 50)),
        "has 50 lines",
    ),
}


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "def tell():\n    print(1)",
        "if run.scale == 'full':\n    print(1)\n    plotting.show(fig)",
        "for x in []:\n    print(x)",
        "try:\n    1 / 1\nexcept ZeroDivisionError:\n    print(1)",
        "%matplotlib inline\nprint(1)",
    ],
)
def test_a_cell_that_need_not_show_anything_passes(
    tmp_path: Path, good: Notebook, source: str
) -> None:
    notebook = copies.deepcopy(good)
    _code(notebook)[3].update(source=source, outputs=[])
    assert _faults(tmp_path, notebook) == []


VERDICTS_IN_PROSE = (
    "C1: supported",
    "C1 — supported at small",
    "*C1* was contradicted",
    "This claim is contradicted by our run",
    "C1 and C1 are supported",
    "Here, with both arms, the effect is <b>supported</b>.",
    "At a long length and after many steps C1, about the gates,\nturned out to be\nsupported.",
    "The interval is wide, e.g. at `small`. By the rule it is Inconclusive.",
    "- One thing\n- C1 was\n  reproduced",
    "The verdicts at `medium`: two supported, one open.",
    "The effect is *supported* here.",
    "The effect is __contradicted__ here.",
    "The effect is `inconclusive` here.",
    "The effect is “reproduced” here.",
    'The effect is "**supported**" here.',
    "It was <em class='v'>reproduced</em>.",
    "| effect | Contradicted |",
    "In our run C1 (cf. Table 2, e.g. Adam) was supported.",
)


@pytest.mark.parametrize("text", VERDICTS_IN_PROSE)
def test_a_verdict_typed_in_prose_is_caught(tmp_path: Path, good: Notebook, text: str) -> None:
    bad = copies.deepcopy(good)
    _prose(bad)["source"] = text.splitlines(keepends=True)
    found = _faults(tmp_path, bad)
    assert len(found) == 1
    assert "a verdict typed by hand" in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "C1 compares two arms. Rotary positions are supported by the kernel.",
        "The table of claims follows.\n\nThis form is supported by the hardware.",
        "The flag `fused` supported by the driver is read; see <b>this</b> supported list.",
        "We reproduced the released code's outputs to rounding.",
        "Its margin is 0.1; C1 rests on an interval of 0.2 to 0.3.",
    ],
)
def test_prose_without_a_verdict_passes(tmp_path: Path, good: Notebook, text: str) -> None:
    notebook = copies.deepcopy(good)
    _prose(notebook)["source"] = text
    assert _faults(tmp_path, notebook) == []


def test_the_good_notebook_passes(tmp_path: Path, good: Notebook) -> None:
    assert _faults(tmp_path, good) == []


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_caught(tmp_path: Path, good: Notebook, fault: str) -> None:
    plant, message = PLANTS[fault]
    bad = copies.deepcopy(good)
    plant(bad)
    found = _faults(tmp_path, bad)
    assert len(found) == 1
    assert message in found[0]


def test_a_file_that_is_no_notebook_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.ipynb"
    path.write_text("{")
    assert "not readable as a notebook" in gates.check_notebook(path, set())[0]


@pytest.mark.parametrize("slug", SLUGS[:1])
class TestPlantedInARealChapter:
    """Faults in a copy of a chapter that passes."""

    def test_no_evidence(self, copy: Path, slug: str) -> None:
        ledger.evidence_path(copy, slug, "small").unlink()
        assert "no evidence at small" in gates.check_chapter(copy, slug)[0]

    def test_stale_evidence(self, copy: Path, slug: str) -> None:
        path = copy / f"chapters/{slug}.yml"
        path.write_text(path.read_text() + "# a comment\n")
        assert gates.check_chapter(copy, slug) == []  # what cannot change a number ages nothing
        text = re.sub(
            r"(\n    settings:.*?)(\d+)", r"\g<1>9\g<2>", path.read_text(), count=1, flags=re.DOTALL
        )
        path.write_text(text)
        assert "evidence at small is stale" in gates.check_chapter(copy, slug)[0]

    def test_over_time_and_over_memory(self, copy: Path, slug: str) -> None:
        data = json.loads(ledger.evidence_path(copy, slug, "small").read_text())
        data |= {"wall_seconds": 61.0, "peak_memory_mb": {"host": 5000.0}}
        ledger.evidence_path(copy, slug, "small").unlink()
        ledger.write(copy, {key: data[key] for key in ledger.FIELDS})
        faults = "\n".join(gates.check_chapter(copy, slug))
        assert "small took 61.0 s; the limit is 60 s" in faults
        assert "small took 5000.0 MB" in faults

    def test_verdict_typed_into_the_evidence(self, copy: Path, slug: str) -> None:
        path = ledger.evidence_path(copy, slug, "small")
        data = json.loads(path.read_text())
        test_id = next(iter(data["tests"]))
        data["tests"][test_id]["verdict"] = "inconclusive"
        path.write_text(json.dumps(data))
        assert "but its rule gives" in gates.check_chapter(copy, slug)[0]

    def test_verdict_typed_into_the_yml(self, copy: Path, slug: str) -> None:
        path = copy / f"chapters/{slug}.yml"
        path.write_text(
            path.read_text().replace("statement:", "verdict: supported\n    statement:", 1)
        )
        assert "verdict: unknown field" in gates.check_chapter(copy, slug)[0]

    def test_a_placeholder_left(self, copy: Path, slug: str) -> None:
        path = copy / f"chapters/{slug}.yml"
        path.write_text(path.read_text().replace("venue: ", "venue: FILL IN ", 1))
        assert "left to replace" in "\n".join(gates.check_chapter(copy, slug))
