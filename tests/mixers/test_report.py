"""The table of mixers: who wins, who ties, who diverged."""

import re

import pytest

from gatebook.mixers import compare, report


def trial(mixer, task, lr, seed, *, choosing=False):
    own = {"file": "", "data_dir": "", "device": "cpu", "settings": {}, "choosing": choosing}
    return compare.Trial(mixer=mixer, task=task, lr=lr, seed=seed, **own)


def kept():
    found = []
    for mixer, text, right in (("a", 1.0, 0.5), ("b", 2.0, 0.9), ("c", float("nan"), 0.1)):
        for lr in (0.1, 0.2):
            found.append((trial(mixer, "text", lr, 9, choosing=True), {"loss": text, "text": text}))
        for seed, wobble in enumerate((-0.01, 0.0, 0.01)):
            found.append((trial(mixer, "text", 0.1, seed), {"text": text + wobble}))
            scores = {f"{n} pairs": right + wobble for n in range(8)}
            found.append((trial(mixer, "recall", 0.15, seed), scores))
    return report.rows(found)


def cells(html):
    rows = re.findall(r'<tr><th scope="row">(\w)</th>(.*?)</tr>', html)
    return [(name, re.findall(r"<td>(.*?)</td>", row)) for name, row in rows]


def test_the_best_mean_is_bold_and_the_lowest_loss_is_best():
    table = dict(cells(report.table_html(kept()).split("</table>")[0]))
    assert table["a"][0].startswith("<strong>1.000 ± 0.025</strong>")
    assert table["b"][0].startswith("2.000 ± 0.025")


def test_the_greatest_share_is_best_elsewhere():
    table = dict(cells(report.table_html(kept()).split("</table>")[1]))
    assert table["b"][0].startswith("<strong>0.90 ± 0.02</strong>")
    assert table["a"][0].startswith("0.50 ± 0.02")


def test_intervals_that_overlap_tie():
    rows = kept()
    for row in rows:
        if row["mixer"] == "a" and row["task"] == "recall":
            row["value"] += 0.38  # 0.88 ± 0.02 beside 0.90 ± 0.02
    table = dict(cells(report.table_html(rows).split("</table>")[1]))
    assert "<strong>" in table["a"][0]
    assert "<strong>" in table["b"][0]


def test_a_run_that_diverged_is_said():
    assert dict(cells(report.table_html(kept()).split("</table>")[0]))["c"] == ["diverged"]


def test_a_rate_at_the_end_of_the_grid_has_an_asterisk():
    first, second = report.table_html(kept()).split("</table>")[:2]
    assert "<small>0.1*</small>" in first
    assert "<small>0.15</small>" in second


def test_wide_tables_are_parted_by_task():
    html = report.table_html(kept())
    assert html.count("<table") == 2
    assert [len(row) for _, row in cells(html)] == [1, 1, 1, 8, 8, 8]


def test_the_interval_is_that_of_students_t():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert report.interval([5.0]) == (5.0, 0.0)
