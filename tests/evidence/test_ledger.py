"""Evidence files: whole or not at all, refused when damaged, never overwritten when damaged."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import chapter_fields
from gatebook.evidence import ledger, provenance, schema, verdicts

OBSERVED = {
    "accuracy": {
        "method": {"0": 0.9, "1": 0.91, "2": 0.92},
        "baseline": {"0": 0.5, "1": 0.5, "2": 0.52},
    }
}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A book with one chapter, `toy`."""
    (tmp_path / "chapters").mkdir()
    fields = yaml.safe_dump(chapter_fields(), sort_keys=False)
    (tmp_path / "chapters/toy.yml").write_text(fields)
    cell = {"cell_type": "code", "metadata": {}, "source": ["x = 1\n"], "outputs": []}
    (tmp_path / "chapters/toy.ipynb").write_text(json.dumps({"nbformat": 4, "cells": [cell]}))
    return tmp_path


def _body(book: Path, **changes: object) -> dict:
    chapter = schema.load(book / "chapters/toy.yml")
    outcome = verdicts.evaluate(chapter.tests()[0], OBSERVED)
    return {
        "chapter": "toy",
        "scale": "small",
        "seed": 0,
        "observations": OBSERVED,
        "tests": {"method-wins": ledger.test_record(outcome.test, outcome)},
        "claims": {"C1": outcome.verdict},
        "settings": {},
        "command": "papermill chapters/toy.ipynb out.ipynb",
        "commit": "abc1234",
        "hash": provenance.chapter_hash(book, "toy", "small"),
        "versions": {"python": "3.11"},
        "hardware": {"cpu": "a CPU", "threads": 1},
        "date": "2026-01-02T03:04:05+00:00",
        "wall_seconds": 1.0,
        "peak_memory_mb": {"host": 100.0},
    } | changes


def test_write_then_read_and_the_row(book: Path) -> None:
    ledger.write(book, _body(book))
    row = ledger.rows(book)[0]
    assert list(row) == list(ledger.COLUMNS)
    assert row["verdict"] == "supported"
    assert row["ours"].startswith("accuracy method − baseline: 0.403")
    assert (row["seeds"], row["date"], row["stale"]) == ("3", "2026-01-02", "no")
    assert ledger.rows(book)[1]["verdict"] == "not run"


def test_tsv_has_one_line_for_each_claim_and_scale(book: Path) -> None:
    lines = ledger.tsv(ledger.rows(book)).splitlines()
    assert lines[0].split("\t") == list(ledger.COLUMNS)
    assert len(lines) == 1 + 3
    assert all(len(line.split("\t")) == len(ledger.COLUMNS) for line in lines)


def test_a_changed_chapter_makes_evidence_stale(book: Path) -> None:
    ledger.write(book, _body(book))
    assert not ledger.read(book, "toy", "small").stale
    notebook = book / "chapters/toy.ipynb"
    notebook.write_text(notebook.read_text().replace("x = 1", "x = 2"))
    assert ledger.read(book, "toy", "small").stale


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (lambda c: c["scales"]["small"].update(settings={"steps": 2}), ("small",)),
        (lambda c: c["scales"]["medium"].update(settings={"steps": 2}), ("medium",)),
        (lambda c: c["claims"][0]["tests"][0].update(margin=0.2), ("small",)),
        (lambda c: c["claims"][0]["tests"][0].update(scales=["medium"]), ("small", "medium")),
        (lambda c: c["claims"][0]["tests"][0].update(scales=["small", "full"]), ()),
        (lambda c: c["claims"][0]["tests"][0].update(rationale="another"), ()),
    ],
)
def test_a_scale_is_stale_when_its_own_settings_or_tests_change(book, change, stale):
    path = book / "chapters/toy.yml"
    before = {scale: provenance.chapter_hash(book, "toy", scale) for scale in schema.SCALES[:2]}
    fields = yaml.safe_load(path.read_text())
    fields["scales"] = {name: dict(plan) for name, plan in fields["scales"].items()}
    change(fields)
    path.write_text(yaml.safe_dump(fields))
    after = {scale: provenance.chapter_hash(book, "toy", scale) for scale in before}
    assert tuple(scale for scale in before if before[scale] != after[scale]) == stale


def test_comments_and_outputs_do_not_make_evidence_stale(book: Path) -> None:
    ledger.write(book, _body(book))
    cell = {
        "cell_type": "code",
        "metadata": {},
        "source": ["x = 1  # the same\n"],
        "outputs": [{"output_type": "stream", "name": "stdout", "text": "hello"}],
    }
    (book / "chapters/toy.ipynb").write_text(json.dumps({"nbformat": 4, "cells": [cell]}))
    assert not ledger.read(book, "toy", "small").stale


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "half-written"),
        (lambda text: text.replace("0.92", "0.99"), "edited after"),
        (lambda text: text.replace('"verdict": "supported"', '"verdict": "reproduced"'), "rule"),
        (lambda text: text.replace('"commit"', '"comit"'), "lacks"),
        (lambda text: "", "half-written"),
    ],
)
def test_damaged_evidence_is_refused_and_kept(book: Path, damage: object, message: str) -> None:
    path = ledger.write(book, _body(book))
    broken = damage(path.read_text())
    path.write_text(broken)
    with pytest.raises(ledger.EvidenceError, match=message):
        ledger.read(book, "toy", "small")
    assert path.read_text() == broken
    ledger.write(book, _body(book))
    kept = list(path.parent.glob("small.damaged-*.json"))
    assert [item.read_text() for item in kept] == [broken]
    assert ledger.read(book, "toy", "small").data["seed"] == 0


def _whole(value: object) -> Callable[[dict], object]:
    return lambda data: value


def _field(*place: str, value: object) -> Callable[[dict], object]:
    """A damage that sets the field at a place."""

    def damage(data: dict) -> dict:
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        return data

    return damage


def _without_verdict(data: dict) -> dict:
    del data["tests"]["method-wins"]["verdict"]
    return data


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_whole(3), id="a number"),
        pytest.param(_whole(None), id="null"),
        pytest.param(_field("tests", value=None), id="no tests"),
        pytest.param(_field("observations", value=None), id="no observations"),
        pytest.param(
            _field("observations", "accuracy", "method", "0", value="0.9"), id="text for a number"
        ),
        pytest.param(_without_verdict, id="no verdict"),
        pytest.param(
            _field("tests", "method-wins", "definition", "colour", value="red"), id="unknown field"
        ),
    ],
)
def test_evidence_of_a_wrong_shape_is_refused_kept_aside_and_replaced(
    book: Path, damage: Callable[[dict], object]
) -> None:
    path = ledger.write(book, _body(book))
    broken = json.dumps(damage(json.loads(path.read_text())))
    path.write_text(broken)
    with pytest.raises(ledger.EvidenceError, match=r"results/toy/small\.json is damaged"):
        ledger.read(book, "toy", "small")
    ledger.write(book, _body(book, seed=7))
    assert [item.read_text() for item in path.parent.glob("small.damaged-*.json")] == [broken]
    assert ledger.read(book, "toy", "small").data["seed"] == 7


@pytest.mark.parametrize("place", ["toy/medium.json", "other/small.json"])
def test_evidence_in_another_place_is_refused(book: Path, place: str) -> None:
    path = ledger.write(book, _body(book))
    moved = book / "results" / place
    moved.parent.mkdir(exist_ok=True)
    path.rename(moved)
    with pytest.raises(ledger.EvidenceError, match=f"{place} is the evidence of toy at small"):
        ledger.read(book, moved.parent.name, moved.stem)


def test_a_verdict_typed_by_hand_is_refused_even_with_a_new_checksum(book: Path) -> None:
    body = _body(book)
    body["tests"]["method-wins"]["verdict"] = "contradicted"
    ledger.write(book, body)
    with pytest.raises(ledger.EvidenceError, match="says 'contradicted', but its rule gives"):
        ledger.read(book, "toy", "small")


def test_a_full_disk_leaves_the_old_evidence(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ledger.write(book, _body(book))
    before = path.read_text()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ledger.EvidenceError, match=r"No space left.*old evidence is untouched"):
        ledger.write(book, _body(book, seed=1))
    assert path.read_text() == before
    assert sorted(item.name for item in path.parent.iterdir()) == ["small.json"]


def test_an_interrupt_while_writing_leaves_the_old_evidence(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ledger.write(book, _body(book))
    before = path.read_text()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ledger.write(book, _body(book, seed=1))
    assert path.read_text() == before
    assert sorted(item.name for item in path.parent.iterdir()) == ["small.json"]


def test_two_runs_recording_at_once_leave_one_whole_file(book: Path) -> None:
    threads = [
        threading.Thread(target=ledger.write, args=(book, _body(book, seed=seed)))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.read(book, "toy", "small").data["seed"] in range(8)
    assert not list((book / "results/toy").glob("*.partial"))


def test_a_held_lock_is_an_error_not_a_wait_for_ever(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    ledger.write(book, _body(book))
    with (
        FileLock(ledger.lock_path(book)),
        pytest.raises(ledger.EvidenceError, match="another run is recording"),
    ):
        ledger.write(book, _body(book, seed=1))
    assert ledger.read(book, "toy", "small").data["seed"] == 0
