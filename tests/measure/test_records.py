"""Recorded benchmarks: what is written is read, ratios are right, damage is named."""

import csv
import io
import json
from pathlib import Path

import pytest

from gatebook.measure import records
from gatebook.measure.records import Record

COLUMNS = "case metric T ours baseline baseline_name ratio hardware date"


def about(**changes: object) -> dict[str, object]:
    return {
        "suite": "gpu",
        "device": "cuda",
        "hardware": "Some GPU",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.11"},
        "command": "python benchmarks/kernels.py gpu",
    } | changes


def record(metric: str, T: int | None, method: str, value: float, case: str = "c") -> Record:
    return Record(case=case, metric=metric, T=T, method=method, value=value)


def planted(path: Path, *found: Record, **changes: object) -> records.Run:
    records.write(path, about(**changes), found)
    return records.read(path)


def test_the_report_has_exactly_its_columns_and_a_row_for_each_baseline(tmp_path: Path) -> None:
    run = planted(
        tmp_path / "a.json",
        record("fwd", 2048, "ours", 0.25),
        record("fwd", 2048, "fla", 0.75),
        record("fwd", 2048, "floor", 0.1),
        record("first_call", 2048, "ours", 12.0),
        record("copy", None, "ours", 3000.0, case="machine"),
        record("error", 2048, "ours", 2e-3),
        record("error", 2048, "fla", 3e-3),
    )
    text = records.tsv(records.rows([run]))
    assert text.splitlines()[0] == COLUMNS.replace(" ", "\t")
    table = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    assert [(r["metric"], r["T"], r["ours"], r["baseline"], r["baseline_name"], r["ratio"])
            for r in table] == [
        ("fwd", "2048", "0.25", "0.75", "fla", "3"),
        ("fwd", "2048", "0.25", "0.1", "floor", "0.4"),
        ("first_call", "2048", "12", "", "", ""),
        ("copy", "", "3000", "", "", ""),
        ("error", "2048", "0.002", "0.003", "fla", ""),
    ]  # fmt: skip
    assert {(r["hardware"], r["date"]) for r in table} == {("Some GPU", "2026-01-02")}


def test_a_baseline_of_another_run_is_not_compared(tmp_path: Path) -> None:
    ours = planted(tmp_path / "a.json", record("fwd", 64, "ours", 1.0))
    other = planted(tmp_path / "b.json", record("fwd", 64, "fla", 2.0))
    assert [row["ratio"] for row in records.rows([ours, other])] == ["", ""]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting"),
        ("{}", "lacks suite"),
        (json.dumps(about() | {"records": [{"case": "c"}]}), "missing"),
        (json.dumps(about() | {"records": [record("fwd", 1, "ours", 1.0).__dict__ | {"x": 1}]}),
         "unexpected"),
    ],
)  # fmt: skip
def test_an_unreadable_file_is_an_error_that_names_it(
    tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(records.RecordError, match=f"broken.json is not.*{problem}"):
        records.load(tmp_path)


def test_writing_leaves_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    planted(path, record("fwd", 1, "ours", 1.0))
    run = planted(path, record("fwd", 1, "ours", 2.0), record("fwd", 2, "ours", 3.0), note="ä")
    assert [r.value for r in run.records] == [2.0, 3.0]
    assert run.about["note"] == "ä"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_newest_run_counts_for_each_length(tmp_path: Path) -> None:
    planted(tmp_path / "a.json", *(record("fwd", T, "ours", 1.0) for T in (64, 128)))
    planted(tmp_path / "b.json", record("fwd", 64, "ours", 2.0), date="2026-02-01T00:00:00+00:00")
    runs = records.load(tmp_path)
    assert [run.name for run in runs] == ["b.json", "a.json"]
    assert records.series(runs, "c", "fwd", "ours") == {64: 2.0, 128: 1.0}


def test_the_crossover_of_two_power_laws_is_exact() -> None:
    lengths = (256, 512, 2048, 4096)
    linear, square = {T: 10.0 * T for T in lengths}, {T: T * T / 100 for T in lengths}
    assert records.crossover(linear, square) == pytest.approx(1000)
    assert records.crossover(square, linear) is None
    assert records.crossover(linear, {T: 2 * ms for T, ms in linear.items()}) is None
    assert records.crossover({}, square) is None


def test_where_ours_is_faster_in_words() -> None:
    one, two = {1000: 1.0, 2000: 1.0}, {1000: 2.0, 2000: 2.0}
    assert records.faster_from(one, two) == "at every length measured"
    assert records.faster_from(two, one) == "at no length measured"
    assert records.faster_from({}, one) == "(not measured)"
    assert records.faster_from({500: 5.0, 2000: 20.0}, {500: 2.5, 2000: 40.0}) == (
        "from about 1,000 tokens on"
    )
