"""The command line: help, errors that exit with 1 or 2, failed runs that keep their notebook."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gatebook.cli import main
from gatebook.evidence import ledger

COMMANDS = ("list", "run", "estimate", "verify", "scoreboard", "new", "data")


def _call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def test_help_names_every_command_and_shows_where_to_start() -> None:
    text = _call("--help").output
    assert "gatebook run gla" in text
    for command in COMMANDS:
        assert f"\n  {command} " in text
        assert _call(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "gal"), "unknown chapter 'gal'. Did you mean 'gla'"),
        (("run", "gla", "-p", "sede=1"), "unknown parameter 'sede'. Did you mean 'seed'?"),
        (("run", "gla", "-p", "seed=one"), "parameter 'seed' must be int, got 'one'"),
        (("run", "gla", "-p", "record=maybe"), "parameter 'record' must be bool"),
        (("run", "gla", "-p", "seed"), "-p needs NAME=VALUE"),
        (("run", "gla", "-p", "scale=full"), "give the scale with --scale"),
        (("run", "gla", "--scale", "huge"), "'small', 'medium', 'full'"),
        (("run", "gla", "--scale", "medium", "--update"), "--update is for --scale small"),
        (("verify", "gal"), "unknown chapter 'gal'"),
        (("estimate", "gal"), "unknown chapter 'gal'"),
        (("estimate", "swin", "--gpus", "7"), "do not share a global batch of 1024 evenly"),
        (("estimate", "swin", "--gpu", "Potato"), "'Potato' is not known"),
        (("estimate", "gla", "--arm", "vectr"), "'vectr'. Did you mean 'vector'?"),
        (("data", "cifar"), "unknown data set 'cifar'. Did you mean 'cifar10' or 'cifar100'?"),
    ],
)
def test_bad_input_says_what_is_allowed_before_anything_starts(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatebook.runner.execute", lambda *_: pytest.fail("it started"))
    result = _call(*words)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())


def test_scoreboard_tsv_has_the_columns_and_a_row_for_each_claim_and_scale(root: Path) -> None:
    lines = _call("scoreboard", "--tsv").output.splitlines()
    assert lines[0] == (
        "chapter\tclaim\tstatement\tscale\tverdict\tours\tinterval\tpaper\tseeds\thardware\tdate"
        "\tcommit\tstale"
    )
    claims = sum(len(ledger.load_chapter(root, slug).claims) for slug in ledger.chapters(root))
    assert len(lines) == 1 + 3 * claims


def test_list_names_every_chapter(root: Path) -> None:
    text = _call("list").output
    for slug in ledger.chapters(root):
        assert f"\n{slug} " in "\n" + text


def test_estimate_says_steps_hours_and_data() -> None:
    text = _call("estimate", "gla", "--gpus", "4", "--arm", "transformer", "--gpu", "A100").output
    for word in ("GPU-hours", "on 4 GPU(s)", "slimpajama", "source of these figures"):
        assert word in text
    for word in ("h on 4 A100", "7.00 billion tokens", "recomputed", "a checkpoint"):
        assert word in text
    assert "vector:" not in text


def test_malformed_chapter_is_named_with_file_and_line(copy: Path) -> None:
    path = copy / "chapters/gla.yml"
    path.write_text(path.read_text().replace("year:", "yaer:", 1))
    result = _call("scoreboard")
    assert result.exit_code == 1
    assert "gla.yml" in result.output
    assert "yaer: unknown field" in result.output


def test_damaged_evidence_is_named(copy: Path) -> None:
    ledger.evidence_path(copy, "gla", "small").write_text('{"chapter": "gla",')
    result = _call("scoreboard")
    assert result.exit_code == 1
    assert "results/gla/small.json is damaged or half-written" in result.output


def _break(copy: Path, line: str) -> None:
    """Put a line at the start of the notebook's cell after the parameters."""
    path = copy / "chapters/gla.ipynb"
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[1]["source"] = line
    path.write_text(json.dumps(notebook))


def test_a_failing_cell_exits_1_names_the_cell_and_keeps_the_notebook(copy: Path) -> None:
    _break(copy, "raise RuntimeError('planted')")
    result = _call("run", "gla")
    assert result.exit_code == 1
    assert "gla: code cell 2 failed with RuntimeError: planted" in result.output
    assert "planted" in (copy / "runs/gla-small.ipynb").read_text()


@pytest.mark.parametrize("words", [["--record"], ["--update"]])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 143)])
def test_a_signal_keeps_the_notebook_and_the_old_evidence(
    copy: Path, name: str, code: int, words: list[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    before = ledger.evidence_path(copy, "gla", "small").read_text()
    _break(
        copy,
        f"import os, signal\nprint('so far')\nos.kill(os.getppid(), signal.{name})\n"
        "import time; time.sleep(20)",
    )
    result = _call("run", "gla", *words)
    assert result.exit_code == code
    assert ("Aborted" in result.output) == (name == "SIGINT")
    assert (copy / "runs/gla-small.ipynb").is_file()
    assert ledger.evidence_path(copy, "gla", "small").read_text() == before
    assert [p.name for p in (copy / "results/gla").glob(".*")] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "there is no such notebook in chapters/"),
        ("{", "not readable as a notebook: JSONDecodeError"),
        ("3", "not readable as a notebook: TypeError"),
        ('{"cells": []}', "not readable as a notebook: KeyError: 'nbformat'"),
        (
            '{"nbformat": 3, "cells": []}',
            "not readable as a notebook: ValueError: nbformat is 3, not 4",
        ),
        ('{"nbformat": 4, "cells": [{}]}', "not readable as a notebook: KeyError"),
    ],
)
def test_a_missing_or_broken_notebook_is_named(
    copy: Path, text: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatebook.runner.execute", lambda *_: pytest.fail("it started"))
    path = copy / "chapters/gla.ipynb"
    path.unlink() if text is None else path.write_text(text)
    for words in (("run", "gla"), ("run", "gla", "-p", "seed=1"), ("list",)):
        result = _call(*words)
        assert result.exit_code == 1
        assert f"Error: gla.ipynb: {problem}" in result.output


def test_a_cell_that_is_not_python_is_named(copy: Path) -> None:
    _break(copy, "x = = 1")
    result = _call("list")
    assert result.exit_code == 1
    assert "Error: gla.ipynb: code cell 2: invalid syntax" in result.output


def test_list_names_a_chapter_file_that_is_broken(copy: Path) -> None:
    (copy / "chapters/gla.yml").write_bytes(b"slug: gla\ntitle: \xff\n")
    result = _call("list")
    assert result.exit_code == 1
    assert "Error: gla.yml:2: not UTF-8" in result.output


def test_the_module_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gatebook.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "gatebook run gla" in done.stdout


@pytest.mark.filterwarnings("ignore:the file is not specified with any extension")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_message(copy: Path) -> None:
    result = _call("run", "gla", "-o", "/dev/full")
    assert result.exit_code == 1
    assert "Error: gla: could not write /dev/full: No space left on device" in result.output


def _record_again(root: Path, slug: str, _parameters: object, output: Path) -> None:
    """What a run leaves: new evidence, and an executed notebook."""
    data = ledger.read(root, slug, "small").data
    ledger.write(root, {key: data[key] for key in ledger.FIELDS} | {"date": "2030-01-01"})
    output.parent.mkdir(exist_ok=True)
    notebook = json.loads((root / f"chapters/{slug}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "new"}]
    output.write_text(json.dumps(notebook))


def _files(folder: Path) -> dict[Path, bytes]:
    names = ("chapters", "results")
    return {
        path: path.read_bytes()
        for name in names
        for path in (folder / name).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_update_replaces_evidence_and_outputs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(copy)
    monkeypatch.setattr("gatebook.runner.execute", _record_again)
    assert _call("run", "gla", "--update").exit_code == 0
    after = _files(copy)
    assert after.keys() == before.keys()
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {"small.json", "gla.ipynb"}


@pytest.mark.parametrize("recorded", [True, False])
def test_a_full_disk_in_update_leaves_old_evidence_and_old_outputs(
    copy: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    evidence = ledger.evidence_path(copy, "gla", "small")
    kept = evidence.read_bytes()
    if not recorded:
        evidence.unlink()
    before = _files(copy)

    def full(path: Path, text: str, **_: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    def run_then_full(root: Path, slug: str, parameters: object, output: Path) -> None:
        evidence.write_bytes(kept)
        _record_again(root, slug, parameters, output)
        monkeypatch.setattr(Path, "write_text", full)

    monkeypatch.setattr("gatebook.runner.execute", run_then_full)
    result = _call("run", "gla", "--update")
    assert result.exit_code == 1
    assert "could not write chapters/gla.ipynb: No space left on device" in result.output
    assert _files(copy) == before


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scale": "huge"}, "unknown scale 'huge'"),
        ({"seed": "zero"}, "'seed' must be of type int"),
        ({"sede": 1}, "unknown parameter 'sede'"),
    ],
)
def test_raw_papermill_with_a_bad_parameter_raises(
    root: Path, tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    import papermill

    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(
            str(root / "chapters/gla.ipynb"),
            str(tmp_path / "out.ipynb"),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
        )
    assert error.value.ename == "ValueError"
    assert message in error.value.evalue


def test_full_without_a_network_names_data_set_size_and_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    from gatebook.data import sources

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("GATEBOOK_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(sources.DataUnavailableError) as error:
        sources.load("slimpajama", "train", streaming=True)
    for part in ("slimpajama", "895 GB", "datasets.load_dataset", "data_dir"):
        assert part in str(error.value)
