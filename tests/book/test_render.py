"""The badge, scoreboard and summary show what the ledger holds, and nothing else."""

import re
from html import unescape

import pytest

from gatebook.book import render
from gatebook.book.papers import papers
from gatebook.evidence.ledger import COLUMNS
from gatebook.evidence.verdicts import VERDICTS


def row(claim: str, scale: str, verdict: str, **more: str) -> dict[str, str]:
    """A ledger row of chapter `gla`."""
    ran = {
        "ours": "accuracy a − b: 0.12 fraction",
        "interval": "[0.07, 0.17]",
        "seeds": "3",
        "hardware": "NVIDIA H200",
        "date": "2026-11-20",
        "stale": "no",
    }
    missing = {key: "" for key in ran} | {"ours": "no test at this scale"}
    found = missing if verdict == "not run" else ran
    base = {"chapter": "gla", "claim": claim, "statement": f"Statement of {claim}", "scale": scale}
    return {key: "" for key in COLUMNS} | base | {"verdict": verdict} | found | more


ROWS = [
    row("C1", "small", "not run"),
    row("C1", "medium", "not run"),
    row("C1", "full", "not run", ours="needs 100B tokens; price: 8 × A100 for fourteen whole days"),
    row("C2", "small", "supported", date="2026-11-24", hardware="some CPU, 1 thread(s)"),
    row("C2", "medium", "contradicted", stale="yes"),
    row("C2", "full", "not run"),
]


def board(rows: list[dict[str, str]]) -> str:
    """The scoreboard of some rows, where only `gla` has a page."""
    return render.scoreboard(
        papers(),
        render.claim_lines(rows),
        chapter_link=lambda slug: "../chapters/gla.html" if slug == "gla" else None,
        tsv="scoreboard.tsv",
    )


def text(html: str) -> str:
    """The words of some HTML."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_verdict_words_are_the_ledgers() -> None:
    assert render.VERDICTS == VERDICTS


def test_badge_shows_each_claim_at_each_scale() -> None:
    html = render.badge(render.claim_lines(ROWS)["gla"], scoreboard="../s.html", arxiv="2312.06635")
    assert text(html).startswith(
        "C1 Statement of C1 small – not run medium – not run full – not run "
        "C2 Statement of C2 small ✓ supported medium ✗ contradicted full – not run"
    )
    assert 'href="../s.html#gla-C2"' in html
    assert 'href="https://arxiv.org/abs/2312.06635"' in html


def test_badge_names_newest_evidence_and_staleness() -> None:
    lines = render.claim_lines(ROWS)["gla"]
    words = text(render.badge(lines, scoreboard="s.html", arxiv="2312.06635"))
    assert "Newest evidence: 2026-11-24, some CPU, 1 thread(s), small scale." in words
    assert "Code changed since." in words


def test_badge_of_fresh_evidence_does_not_warn() -> None:
    fresh = [r | {"stale": "no" if r["date"] else ""} for r in ROWS]
    words = text(render.badge(render.claim_lines(fresh)["gla"], scoreboard="s", arxiv="2312.06635"))
    assert "Code changed" not in words


def test_badge_without_evidence_says_so() -> None:
    lines = render.claim_lines(ROWS[:3])["gla"]
    assert "No evidence recorded yet." in text(render.badge(lines, scoreboard="s", arxiv="1"))


def test_scoreboard_lists_all_papers_and_marks_the_planned() -> None:
    html = board(ROWS)
    assert len(re.findall(r'<span class="gb-v gb-planned">', html)) == len(papers()) - 1
    assert all(f'id="{paper.slug}"' in html for paper in papers())
    assert html.count('<th scope="rowgroup"') == 8


def test_scoreboard_shows_numbers_seeds_hardware_date_and_price() -> None:
    words = text(board(ROWS))
    for part in (
        "accuracy a − b: 0.12 fraction [0.07, 0.17] 3 seeds · NVIDIA H200 · 2026-11-20",
        "code changed since",
        "needs 100B tokens; price: 8 × A100 for fourteen whole days",
    ):
        assert part in words


def test_numbers_of_several_tests_stay_with_their_intervals() -> None:
    many = row(
        "C3", "small", "supported", ours="a: 1; b: 2; c: 3", interval="[0, 2]; exact; [2, 4]"
    )
    assert "a: 1 [0, 2] b: 2 exact 1 more c: 3 [2, 4]" in text(board([many]))


def test_ledger_text_is_escaped() -> None:
    hostile = row(
        "C4", "small", "supported", statement='<script>alert("x")</script>', paper="1 < 2"
    )
    html = board([hostile])
    assert "<script>" not in html
    assert "1 &lt; 2" in html


def test_identifiers_are_unique() -> None:
    found = re.findall(r' id="([^"]+)"', board(ROWS))
    assert len(found) == len(set(found))


def test_summary_counts_each_claim_at_its_largest_scale() -> None:
    html = render.summary(
        papers(), render.claim_lines(ROWS), chapter_link=lambda _: None, scoreboard="s.html"
    )
    assert "1 of 46 papers, 2 claims." in text(html)
    assert {v: n for n, v in re.findall(r"<strong>(\d+)</strong> ([a-z ]+)</a>", html)} == {
        "reproduced": "0",
        "supported": "0",
        "contradicted": "1",
        "inconclusive": "0",
        "not run": "1",
    }
    assert html.count('class="gb-cell') == len(papers())


@pytest.mark.parametrize("scale", render.SCALES)
def test_scoreboard_carries_verdicts_for_the_filter(scale: str) -> None:
    expected = next(r["verdict"] for r in ROWS if r["claim"] == "C2" and r["scale"] == scale)
    line = re.search(r'<tr id="gla-C2"[^>]*>', board(ROWS))
    assert line
    assert f'data-{scale}="{expected}"' in line[0]
