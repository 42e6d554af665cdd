"""Rules and intervals, against worked cases and SciPy's own paired test."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from conftest import chapter_fields
from gatebook.evidence import ledger, verdicts
from gatebook.evidence.schema import Test


def _test(**changes: object) -> Test:
    fields = chapter_fields()["claims"][0]["tests"][0] | changes
    return Test.model_validate({key: value for key, value in fields.items() if value != "-"})


def _observed(left: list[float], right: list[float] | None = None) -> dict:
    arms = {"method": {str(i): value for i, value in enumerate(left)}}
    if right is not None:
        arms["baseline"] = {str(i): value for i, value in enumerate(right)}
    return {"accuracy": arms}


def _value(**changes: object) -> Test:
    return _test(right="-", statistic="value", **changes)


def test_interval_is_the_paired_t_interval_of_scipy() -> None:
    left, right = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.55, 0.4]
    outcome = verdicts.evaluate(_test(), _observed(left, right))
    want = stats.ttest_rel(left, right).confidence_interval(0.95)
    assert (outcome.low, outcome.high) == pytest.approx((want.low, want.high), rel=1e-12)
    assert outcome.estimate == pytest.approx(0.325)


def test_interval_of_three_seeds_worked_by_hand() -> None:
    mean, low, high = verdicts.interval([1.0, 2.0, 3.0])  # sd 1, t(0.975, 2) = 4.302653
    assert mean == 2.0
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize(
    ("left", "direction", "margin", "verdict"),
    [
        ([0.50, 0.51, 0.52], "greater", 0.1, "supported"),
        ([0.05, 0.04, 0.06], "greater", 0.1, "contradicted"),
        ([0.0, 0.1, 0.2], "greater", 0.1, "inconclusive"),
        ([0.50, 0.51, 0.52], "less", 0.1, "contradicted"),
        ([0.05, 0.04, 0.06], "less", 0.1, "supported"),
        ([0.001, -0.001, 0.002], "within", 0.1, "supported"),
        ([0.5, 0.51, 0.52], "within", 0.1, "contradicted"),
        ([-0.5, -0.51, -0.52], "within", 0.1, "contradicted"),
        ([0.05, 0.1, 0.15], "within", 0.1, "inconclusive"),
    ],
)
def test_rules(left: list[float], direction: str, margin: float, verdict: str) -> None:
    test = _value(direction=direction, margin=margin)
    assert verdicts.evaluate(test, _observed(left)).verdict == verdict


def test_ratio_is_geometric_and_its_interval_symmetric_in_logs() -> None:
    test = _test(statistic="ratio", margin=1.5)
    outcome = verdicts.evaluate(test, _observed([2.0, 4.0, 8.0], [1.0, 1.0, 1.0]))
    assert outcome.estimate == pytest.approx(4.0)
    assert outcome.low * outcome.high == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("value", "paper", "verdict"),
    [(100, True, "reproduced"), (100, False, "supported"), (101, True, "contradicted")],
)
def test_equal_is_exact(value: float, paper: bool, verdict: str) -> None:
    test = _value(
        direction="equal", margin="-", expected=100, at_paper_configuration=paper, rationale="-"
    )
    assert verdicts.evaluate(test, _observed([value])).verdict == verdict


def test_one_wrong_observation_fails_an_exact_test() -> None:
    test = _value(direction="equal", margin="-", expected=100, rationale="-")
    outcome = verdicts.evaluate(test, _observed([100, 100, 99]))
    assert (outcome.verdict, outcome.estimate) == ("contradicted", 99)


@pytest.mark.parametrize(
    ("values", "direction", "paper", "verdict"),
    [
        ([0.4], "less", True, "reproduced"),
        ([0.4, 0.3], "less", False, "supported"),
        ([0.4, 0.6], "less", False, "contradicted"),
        ([0.5], "less", False, "contradicted"),
        ([0.6], "greater", False, "supported"),
        ([math.nan], "greater", False, "inconclusive"),
    ],
)
def test_counts_need_no_interval(
    values: list[float], direction: str, paper: bool, verdict: str
) -> None:
    test = _value(exact=True, direction=direction, margin=0.5, at_paper_configuration=paper)
    outcome = verdicts.evaluate(test, _observed(values))
    assert outcome.verdict == verdict
    assert "interval" not in outcome.rule
    assert ledger.interval_text(outcome) == "exact"


@pytest.mark.parametrize(("direction", "worst"), [("less", 0.4), ("greater", 0.3)])
def test_of_several_counts_the_worst_is_shown(direction: str, worst: float) -> None:
    test = _value(exact=True, direction=direction, margin=0.5)
    assert verdicts.evaluate(test, _observed([0.4, 0.3])).estimate == worst


def test_a_diverged_run_is_not_averaged_away() -> None:
    outcome = verdicts.evaluate(_value(), _observed([0.9, math.nan, 0.9]))
    assert outcome.verdict == "inconclusive"
    assert "not finite" in outcome.note


def test_not_a_number_fails_an_exact_test() -> None:
    test = _value(direction="equal", margin="-", expected=1, rationale="-")
    assert verdicts.evaluate(test, _observed([math.nan])).verdict == "contradicted"


def test_missing_arm_is_not_run_and_one_seed_is_inconclusive() -> None:
    assert verdicts.evaluate(_test(), _observed([0.9])).verdict == "not run"
    assert verdicts.evaluate(_test(), _observed([0.9], [0.1])).verdict == "inconclusive"


def test_only_shared_seeds_are_paired_and_the_rest_is_told() -> None:
    outcome = verdicts.evaluate(_test(), _observed([0.9, 0.9, 0.9, 0.1], [0.1, 0.1, 0.1]))
    assert outcome.seeds == 3
    assert "1 numbers without a partner" in outcome.note


@pytest.mark.parametrize(
    ("found", "combined"),
    [
        (["supported", "contradicted", "inconclusive"], "contradicted"),
        (["supported", "inconclusive"], "inconclusive"),
        (["reproduced", "supported"], "supported"),
        (["reproduced", "reproduced"], "reproduced"),
        ([], "not run"),
    ],
)
def test_a_claim_is_as_strong_as_its_weakest_test(found: list[str], combined: str) -> None:
    outcomes = [
        verdicts.Outcome(_test(), verdict, None, None, None, 0, "rule") for verdict in found
    ]
    assert verdicts.combine(outcomes) == combined


@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=6),
    st.floats(-1, 1),
    st.sampled_from(["greater", "less"]),
)
def test_greater_and_less_mirror_each_other(
    left: list[float], margin: float, direction: str
) -> None:
    other = {"greater": "less", "less": "greater"}[direction]
    one = verdicts.evaluate(_value(direction=direction, margin=margin), _observed(left)).verdict
    two = verdicts.evaluate(
        _value(direction=other, margin=-margin), _observed([-value for value in left])
    ).verdict
    assert one == two
