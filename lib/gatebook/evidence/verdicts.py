"""From observations to verdicts, by the rules that a chapter declares before it runs.

An observation is a number for a metric, an arm (one of the compared things) and a seed. A test
turns observations into a statistic with a 95 % interval over seeds, and its rule turns the
interval into a verdict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gatebook.evidence.schema import Claim, Test

VERDICTS = ("reproduced", "supported", "contradicted", "inconclusive", "not run")
CONFIDENCE = 0.95

# metric -> arm -> seed -> value; the seed of a number that has none is "-"
Observations = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Outcome:
    """What a test found."""

    test: Test
    verdict: str
    estimate: float | None  # mean difference, geometric mean ratio, or mean value
    low: float | None  # ends of the 95 % interval
    high: float | None
    seeds: int
    rule: str
    note: str = ""


def rule(test: Test) -> str:
    """A test's rule in words."""
    side = {
        "difference": f"{test.left} − {test.right}",
        "ratio": f"{test.left} / {test.right}",
        "value": test.left,
    }[test.statistic]
    name = f"{test.metric}: {side}"
    if test.direction == "equal":
        slack = f" ± {test.tolerance:g}" if test.tolerance else ""
        return f"{name} = {test.expected:.12g}{slack}"
    if test.direction == "within":
        return f"|{name}| ≤ {test.margin:g} over the whole interval"
    sign = ">" if test.direction == "greater" else "<"
    return f"{name} {sign} {test.margin:g}" + " over the whole interval" * test.by_chance


def evaluate(test: Test, observations: Observations) -> Outcome:
    """Apply a test's rule to the observations.

    Seeds that both arms have are paired. A test whose numbers were not observed is `not run`.
    A number that is not finite (a diverged run) is never averaged away: the test is
    `inconclusive` and says so, unless the rule is `equal`, which it fails.
    """
    arms = [observations.get(test.metric, {}).get(arm, {}) for arm in test.arms]
    empty = [name for name, values in zip(test.arms, arms, strict=True) if not values]
    if empty:
        return Outcome(test, "not run", None, None, None, 0, rule(test), f"no numbers for {empty}")
    if test.direction == "equal":
        return _exact(test, list(arms[0].values()))
    sample, note = _sample(test, arms)
    if not all(math.isfinite(value) for value in sample):
        note = "some numbers are not finite"
        return Outcome(test, "inconclusive", None, None, None, len(sample), rule(test), note)
    if test.exact:
        return _all(test, sample)
    if len(sample) < 2:
        note = "one seed has no interval"
        return Outcome(
            test, "inconclusive", _back(test, sample[0]), None, None, 1, rule(test), note
        )
    mean, low, high = interval(sample)
    verdict = _decide(test, _back(test, low), _back(test, high))
    return Outcome(
        test,
        verdict,
        _back(test, mean),
        _back(test, low),
        _back(test, high),
        len(sample),
        rule(test),
        note,
    )


def interval(sample: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % Student-t interval of a sample of at least two numbers."""
    mean = float(np.mean(sample))
    error = float(stats.sem(sample))
    if error == 0.0:
        return mean, mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(sample) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


def combine(outcomes: list[Outcome]) -> str:
    """A claim's verdict: one contradicted test contradicts it; one undecided leaves it open."""
    found = [outcome.verdict for outcome in outcomes]
    if not found:
        return "not run"
    for verdict in ("contradicted", "not run", "inconclusive", "supported"):
        if verdict in found:
            return verdict
    return "reproduced"


def claim_outcomes(claim: Claim, scale: str, observations: Observations) -> list[Outcome]:
    """The outcomes of a claim's tests at one scale."""
    return [evaluate(test, observations) for test in claim.tests if scale in test.scales]


def _exact(test: Test, values: list[float]) -> Outcome:
    ok = all(abs(value - test.expected) <= test.tolerance for value in values)
    good = "reproduced" if test.at_paper_configuration else "supported"
    worst = max(values, key=lambda value: abs(value - test.expected))
    verdict = good if ok else "contradicted"
    return Outcome(test, verdict, worst, worst, worst, len(values), rule(test))


def _all(test: Test, values: list[float]) -> Outcome:
    """Every number is on the claimed side, or the claim is contradicted."""
    verdict = _decide(test, min(values), max(values))
    if verdict == "supported" and test.at_paper_configuration:
        verdict = "reproduced"
    elif verdict == "inconclusive":
        verdict = "contradicted"
    worst = (min if test.direction == "greater" else max)(values)
    return Outcome(test, verdict, worst, worst, worst, len(values), rule(test))


def _sample(test: Test, arms: list[Mapping[str, float]]) -> tuple[list[float], str]:
    """One number a seed, on the scale on which the interval is symmetric (log for a ratio)."""
    if test.right is None:
        return list(arms[0].values()), ""
    shared = [seed for seed in arms[0] if seed in arms[1]]
    left, right = ([arm[seed] for seed in shared] for arm in arms)
    lost = len(set(arms[0]) ^ set(arms[1]))
    note = f"{lost} numbers without a partner left out" if lost else ""
    if test.statistic == "difference":
        return [a - b for a, b in zip(left, right, strict=True)], note
    logs = [
        math.log(a / b) if a > 0 and b > 0 else math.nan for a, b in zip(left, right, strict=True)
    ]
    return logs, note


def _back(test: Test, value: float) -> float:
    return math.exp(value) if test.statistic == "ratio" else value


def _decide(test: Test, low: float, high: float) -> str:
    margin = test.margin
    if test.direction == "within":
        if -margin <= low and high <= margin:
            return "supported"
        return "contradicted" if low > margin or high < -margin else "inconclusive"
    if test.direction == "less":
        low, high, margin = -high, -low, -margin
    if low > margin:
        return "supported"
    return "contradicted" if high < margin else "inconclusive"
