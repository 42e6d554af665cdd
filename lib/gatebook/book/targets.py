"""What the kernels were to reach, and whether they did: a table on the page book/kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import yaml

from gatebook.book.tables import number, table
from gatebook.measure import records

if TYPE_CHECKING:
    from gatebook.book.kernels import Results


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit that was set before the kernels were written.

    `kind` is "at most" (a value), "times faster" (baseline / ours, at least), "times as long"
    (ours / baseline, at most) or "of the floor" (a fraction, at least). Over several lengths the
    worst one counts.
    """

    words: str
    case: str
    metric: str
    kind: str
    reach: float
    aim: float | None = None
    baseline: str = ""
    lengths: Sequence[int] = ()  # empty: every length that was measured


@cache
def all_targets() -> tuple[Target, ...]:
    """The targets of ``targets.yml``, which lies beside this module."""
    text = resources.files(__package__).joinpath("targets.yml").read_text("utf-8")
    return tuple(Target(**entry) for entry in yaml.safe_load(text))


def measured(target: Target, results: "Results") -> dict[int, float]:
    """What was measured for a target: length and value, or ratio, in the order of lengths."""
    if target.kind == "at most":
        found = results.series(target.case, target.metric, "ours")
    else:
        found = results.ratios(target.case, target.metric, target.baseline)
    return {T: x for T, x in found.items() if not target.lengths or T in target.lengths}


def reached(target: Target, results: "Results") -> float | None:
    """The worst of what was measured for a target; None if nothing was."""
    values = measured(target, results).values()
    if not values:
        return None
    worst = max(values) if target.kind == "at most" else min(values)
    return 1 / worst if target.kind == "times as long" else worst


def outcome(target: Target, value: float | None) -> str:
    """Whether a target was met: "aim reached", "reached", "missed" or "not measured"."""
    if value is None:
        return "not measured"
    sign = 1 if target.kind in ("at most", "times as long") else -1
    if target.aim is not None and sign * value <= sign * target.aim:
        return "aim reached"
    return "reached" if sign * value <= sign * target.reach else "missed"


def table_of(results: "Results") -> str:
    """Every target with what was measured."""
    rows = []
    for target in all_targets():
        value = reached(target, results)
        sign = "≤ " if target.kind in ("at most", "times as long") else "≥ "
        limits = (
            "–" if x is None else sign + _amount(target, x) for x in (target.reach, target.aim)
        )
        amount = "–" if value is None else _amount(target, value)
        verdict = outcome(target, value)
        lengths = measured(target, results)
        if lengths and set(target.lengths) > set(lengths) and verdict != "missed":
            verdict += f" at {' and '.join(map(str, lengths))}; the rest not measured"
        rows.append((target.words, *limits, amount, verdict))
    head = ("what", "to reach", "aim", "measured", "outcome")
    return table("What was to be reached on one H100", head, rows)


def _amount(target: Target, value: float) -> str:
    if target.kind == "of the floor":
        return f"{100 * value:.0f} %"
    if target.kind == "at most":
        return f"{number(value)} {records.unit(target.metric)}"
    return f"{value:.2f} ×"
