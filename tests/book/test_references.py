"""The list of papers and the bibliography agree."""

import re
from pathlib import Path

from gatebook.book.papers import entries, papers
from gatebook.evidence import ledger

ROOT = Path(__file__).resolve().parents[2]
BIBLIOGRAPHY = (ROOT / "book" / "references.bib").read_text("utf-8")


def test_there_are_46_papers_in_8_parts() -> None:
    assert len({paper.slug for paper in papers()}) == len(papers()) == 46
    assert len({paper.arxiv for paper in papers()}) == 46
    assert len({paper.part for paper in papers()}) == 8


def test_bibliography_lists_the_papers_in_reading_order() -> None:
    assert re.findall(r"^@\w+\{([^,]+),", BIBLIOGRAPHY, re.MULTILINE) == [p.slug for p in papers()]
    assert re.findall(r"eprint = \{([\d.]+)\}", BIBLIOGRAPHY) == [p.arxiv for p in papers()]


def test_chapters_agree_with_the_list_of_papers() -> None:
    listed = {entry.slug: entry for entry in entries()}
    for slug in ledger.chapters(ROOT):
        chapter, paper = ledger.load_chapter(ROOT, slug), listed[slug]
        found = (chapter.arxiv or "", chapter.part, chapter.thin)
        assert found == (paper.arxiv, paper.part, paper.thin), slug
