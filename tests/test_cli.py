"""The command line: help, errors that exit with 1 or 2, failed runs that keep their notebook."""

import json
import signal
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
        (("data", "cifar"), "unknown data set 'cifar'. Did you mean 'cifar10'?"),
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
    text = _call("estimate", "gla", "--gpus", "4").output
    for word in ("GPU-hours", "on 4 GPU(s)", "slimpajama", "source of these figures"):
        assert word in text


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


def test_ctrl_c_keeps_the_notebook_and_the_old_evidence(copy: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    before = ledger.evidence_path(copy, "gla", "small").read_text()
    _break(
        copy,
        "import os, signal\nprint('so far')\nos.kill(os.getppid(), signal.SIGINT)\n"
        "import time; time.sleep(20)",
    )
    result = _call("run", "gla", "--record")
    assert result.exit_code == 1
    assert "Aborted" in result.output
    assert (copy / "runs/gla-small.ipynb").is_file()
    assert ledger.evidence_path(copy, "gla", "small").read_text() == before


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
