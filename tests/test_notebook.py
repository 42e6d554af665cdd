"""`gatebook.start`: parameters are checked before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import gatebook
from conftest import chapter_fields
from gatebook.data.sources import DataUnavailableError
from gatebook.evidence import ledger, provenance

DEFAULTS: dict[str, Any] = {
    "scale": "small",
    "seed": 0,
    "device": "cpu",
    "max_steps": 0,
    "data_dir": "",
    "gpus": 1,
    "strategy": "ddp",
    "confirm": False,
    "record": False,
}


@pytest.fixture(autouse=True)
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters/toy.yml").write_text(yaml.safe_dump(chapter_fields()))
    cells = '{"nbformat": 4, "cells": []}'
    (tmp_path / "chapters/toy.ipynb").write_text(cells)
    monkeypatch.setattr(provenance, "root", lambda: tmp_path)
    return tmp_path


def _start(**changes: Any) -> gatebook.Run:
    return gatebook.start("toy", DEFAULTS | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "meduim"}, r"unknown scale 'meduim'. Did you mean 'medium'\?"),
        ({"device": "gpu"}, "unknown device 'gpu'.*cuda"),
        ({"seed": "0"}, "'seed' must be of type int, got '0'"),
        ({"seed": True}, "'seed' must be of type int, got True"),
        ({"max_steps": 2.0}, "'max_steps' must be of type int"),
        ({"seed": -1}, "0 or more"),
        ({"record": 1}, "'record' must be of type bool"),
        ({"record": True, "max_steps": 5}, "a shortened run is not evidence"),
        ({"data_dir": "no/such/folder"}, "is not a folder"),
        ({"gpus": 0}, "'gpus' must be 1 or more"),
        ({"gpus": 8}, "gpus=8 is for scale='full'"),
        ({"strategy": "fdsp"}, r"unknown strategy 'fdsp'. Did you mean 'fsdp'\?"),
        ({"confirm": 1}, "'confirm' must be of type bool"),
    ],
)
def test_a_wrong_parameter_names_what_is_allowed(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _start(**changes)


def test_an_unavailable_device_is_an_error_and_not_a_fallback() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"'cuda' is not available here; available: cpu"):
        _start(device="cuda")


def test_an_unknown_parameter_injected_by_papermill_is_an_error() -> None:
    cells = ["", "scale = 'small'", "# Parameters\nsede = 1\n", "run = gatebook.start('toy')"]
    with pytest.raises(ValueError, match=r"unknown parameter 'sede'. Did you mean 'seed'\?"):
        _start(In=cells, sede=1)


def test_variables_of_later_cells_are_not_parameters() -> None:
    cells = ["scale = 'small'", "run = gatebook.start('toy')", "loss = 3.0"]
    assert _start(In=cells, loss=3.0).scale == "small"


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="must set 'seed'"):
        gatebook.start("toy", {k: v for k, v in DEFAULTS.items() if k != "seed"})


def test_a_chapters_own_parameter_is_checked_too() -> None:
    assert gatebook.start("toy", DEFAULTS | {"width": 3}, extra={"width": int})
    with pytest.raises(ValueError, match="'width' must be of type int"):
        gatebook.start("toy", DEFAULTS | {"width": "3"}, extra={"width": int})


def test_an_unknown_chapter_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown chapter 'tyo'. Did you mean 'toy'\?"):
        gatebook.start("tyo", dict(DEFAULTS))


def test_seeds_of_different_runs_do_not_overlap() -> None:
    assert _start(seed=0).seeds == [0, 1, 2]
    assert _start(seed=1).seeds == [3, 4, 5]


def test_a_long_run_is_counted_and_has_to_be_confirmed(
    book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # the book itself
    given = DEFAULTS | {"scale": "full"}
    with pytest.raises(ValueError, match=r"about 29 GPU-hours.*confirm = True.*max_steps"):
        gatebook.start("swin", given)
    assert "no_bias: 28.3 M parameters" in capsys.readouterr().out
    for agreed in ({"confirm": True}, {"max_steps": 20}):
        with pytest.raises(DataUnavailableError, match="imagenet-1k"):
            gatebook.start("swin", given | agreed)


def test_full_prints_the_price(capsys: pytest.CaptureFixture[str]) -> None:
    _start(scale="full")
    assert "toy at scale full" in capsys.readouterr().out


def test_steps_is_capped_by_max_steps() -> None:
    assert _start().steps(100) == 100
    assert _start(max_steps=7).steps(100) == 7


def test_observing_what_no_test_uses_is_an_error() -> None:
    run = _start()
    with pytest.raises(ValueError, match=r"unknown metric.*'accuracy'"):
        run.observe("acuracy", "method", 1.0, seed=0)
    with pytest.raises(ValueError, match=r"unknown arm.*'method'"):
        run.observe("accuracy", "metod", 1.0, seed=0)


def test_a_run_turns_observations_into_recorded_verdicts(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _start(record=True)
    for seed in run.seeds:
        run.observe("accuracy", "method", 0.9 + 0.01 * seed, seed)
        run.observe("accuracy", "baseline", 0.5, seed)
    run.claims()
    run.verdicts()
    assert "C1: supported at small" in capsys.readouterr().out
    assert ledger.rows(book)[0]["verdict"] == "supported"
    command = ledger.read(book, "toy", "small").data["command"]
    assert command == "papermill chapters/toy.ipynb out.ipynb -p device cpu -p record True"


def test_progress_passes_items_through() -> None:
    assert list(_start().progress(range(3), "counting")) == [0, 1, 2]


def test_damaged_evidence_of_another_scale_does_not_lose_this_run(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = _start(record=True), []
    monkeypatch.setattr(ledger, "write", lambda root, found: written.append(found) or root / "x")

    def damaged(run: gatebook.Run) -> str:
        raise ledger.EvidenceError("medium.json is damaged")

    monkeypatch.setattr("gatebook.evidence.claims_table.of_run", damaged)
    with pytest.raises(ledger.EvidenceError, match="damaged"):
        run.claims()
    assert len(written) == 1


def test_the_data_are_opened_before_the_work(tmp_path: Path) -> None:
    from gatebook import notebook
    from gatebook.data import sources

    with pytest.raises(sources.DataUnavailableError, match=r"slimpajama: 895 GB.*load_dataset"):
        notebook._check_data("slimpajama", str(tmp_path))
    folder = tmp_path / "slimpajama"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"half of a file")
    with pytest.raises(sources.DataUnavailableError, match=r"slimpajama \(train\) cannot be read"):
        notebook._check_data("slimpajama", str(tmp_path))
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(str(folder / "train.parquet"))
    with pytest.raises(ValueError, match="the column text holds int, it needs str"):
        notebook._check_data("slimpajama", str(tmp_path))
    notebook._check_data("generated", "")


def test_an_empty_data_dir_takes_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEBOOK_DATA", "mirror")
    variables = DEFAULTS | {"data_dir": ""}
    assert gatebook.start("toy", variables).data_dir == "mirror"
    assert variables["data_dir"] == "mirror"


def test_start_stops_where_the_data_are_missing(book: Path) -> None:
    fields = chapter_fields()
    fields["scales"]["small"]["dataset"] = "slimpajama"
    (book / "chapters/toy.yml").write_text(yaml.safe_dump(fields))
    (book / "mirror").mkdir()
    with pytest.raises(RuntimeError, match="slimpajama: 895 GB"):
        _start(data_dir=str(book / "mirror"))
