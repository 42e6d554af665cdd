"""Recorded benchmarks: `benchmarks/results/*.json`, one file for each run of a suite.

A file holds what it ran on and a flat list of records. A record is one number: for a case (a
shape), a metric, a length T and a method. The method "ours" is this library's; every other one is
a baseline, compared with ours of the same file, for only those ran side by side.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COLUMNS = (
    "case",
    "metric",
    "T",
    "ours",
    "baseline",
    "baseline_name",
    "ratio",
    "hardware",
    "date",
)
UNITS = {
    "fwd": "ms",
    "fwdbwd": "ms",
    "fwd_wall": "ms",
    "fwdbwd_wall": "ms",
    "fwd_graph": "ms",
    "step": "ms",
    "memory": "MiB",
    "first_call": "s",
    "copy": "GB/s",
    "matmul": "TFLOP/s",
}
LESS_IS_BETTER = ("ms", "MiB", "s")  # units for which baseline / ours says how many times better
FIELDS = ("suite", "hardware", "device", "date", "versions", "command", "records")


class RecordError(ValueError):
    """A results file cannot be read; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number."""

    case: str
    metric: str
    T: int | None  # tokens of a sequence; None for what has no length
    method: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One results file."""

    name: str  # of the file
    device: str  # "cuda" or "cpu"
    hardware: str  # in a few words
    date: str  # ISO 8601
    about: Mapping[str, Any]  # everything else that the file says
    records: tuple[Record, ...]


def unit(metric: str) -> str:
    """The unit of a metric; empty for relative errors."""
    return UNITS.get(metric, "")


def write(path: Path, about: Mapping[str, Any], records: Iterable[Record]) -> None:
    """Write a results file whole or not at all.

    Args:
        path: The file; its folder is made if it is missing.
        about: The fields of `FIELDS` but for the records, and any others.
        records: What was measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    body = dict(about) | {"records": [asdict(record) for record in records]}
    part = path.with_suffix(".part")
    part.write_text(_one_record_a_line(body), encoding="utf-8")
    os.replace(part, path)


def _one_record_a_line(body: dict[str, Any]) -> str:
    records = ",\n".join("  " + json.dumps(record) for record in body["records"])
    head = json.dumps(body | {"records": []}, indent=1, ensure_ascii=False)
    return head.replace('"records": []', f'"records": [\n{records}\n ]') + "\n"


def read(path: Path) -> Run:
    """Read a results file.

    Raises:
        RecordError: The file is not JSON, lacks a field, or holds a record that is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        missing = [field for field in FIELDS if field not in data]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        records = tuple(Record(**record) for record in data.pop("records"))
    except (OSError, TypeError, ValueError) as error:
        raise RecordError(f"{path.name} is not a readable results file: {error}") from None
    return Run(
        name=path.name,
        device=data["device"],
        hardware=data["hardware"],
        date=data["date"],
        about=data,
        records=records,
    )


def load(folder: Path) -> list[Run]:
    """All results files of a folder, the newest first.

    Raises:
        RecordError: One of them cannot be read.
    """
    runs = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(runs, key=lambda run: run.date, reverse=True)


def rows(runs: Iterable[Run]) -> list[dict[str, str]]:
    """The report: one row for each case, metric, length and baseline, in the order of `COLUMNS`.

    A number without a baseline has a row of its own; so has a baseline that ours was not measured
    beside.
    """
    return [row for run in runs for row in _rows(run)]


def _rows(run: Run) -> list[dict[str, str]]:
    groups: dict[tuple[str, str, int | None], dict[str, float]] = {}
    for record in run.records:
        groups.setdefault((record.case, record.metric, record.T), {})[record.method] = record.value
    return [
        _row(run, place, methods, baseline)
        for place, methods in groups.items()
        for baseline in ([name for name in methods if name != "ours"] or [""])
    ]


def _row(
    run: Run, place: tuple[str, str, int | None], methods: Mapping[str, float], baseline: str
) -> dict[str, str]:
    case, metric, length = place
    ours, other = methods.get("ours"), methods.get(baseline)
    return {
        "case": case,
        "metric": metric,
        "T": "" if length is None else str(length),
        "ours": _number(ours),
        "baseline": _number(other),
        "baseline_name": baseline,
        "ratio": _number(ratio(metric, ours, other)),
        "hardware": run.hardware,
        "date": run.date[:10],
    }


def ratio(metric: str, ours: float | None, baseline: float | None) -> float | None:
    """How many times better ours is, baseline / ours; None where that makes no sense.

    Against the floor this is the fraction of the floor that is reached.
    """
    if ours is None or baseline is None or unit(metric) not in LESS_IS_BETTER or ours <= 0:
        return None
    return baseline / ours


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def tsv(table: Iterable[Mapping[str, str]]) -> str:
    """Report rows as tab-separated text with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def series(runs: Iterable[Run], case: str, metric: str, method: str) -> dict[int, float]:
    """A metric against length, `{T: value}` in the order of T.

    Args:
        runs: The newest first; where several hold a length, the newest counts. Pass runs of one
            kind of hardware.
        case: The case.
        metric: The metric.
        method: "ours" or a baseline.
    """
    found: dict[int, float] = {}
    for run in runs:
        for record in run.records:
            if (record.case, record.metric, record.method) == (case, metric, method):
                found.setdefault(record.T or 0, record.value)
    return dict(sorted(found.items()))


def crossover(ours: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """The length from which ours is the faster one.

    Interpolated on straight lines in log-log between the last measured length where ours was
    slower and the next.

    Args:
        ours: Time against length.
        baseline: The same of the other.

    Returns:
        Tokens; None when the order does not change between the lengths that both have.
    """
    shared = sorted(set(ours) & set(baseline))
    lead = [math.log(ours[T] / baseline[T]) for T in shared]
    for i in reversed(range(len(shared) - 1)):
        if lead[i] > 0 >= lead[i + 1]:
            share = lead[i] / (lead[i] - lead[i + 1])
            return math.exp((1 - share) * math.log(shared[i]) + share * math.log(shared[i + 1]))
    return None


def faster_from(ours: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    """Where ours is the faster one, in words; arguments as `crossover`."""
    at = crossover(ours, baseline)
    if at is not None:
        return f"from about {at:,.0f} tokens on"
    shared = set(ours) & set(baseline)
    if shared and all(ours[T] < baseline[T] for T in shared):
        return "at every length measured"
    return "at no length measured" if shared else "(not measured)"
