"""The table of prices counts what `gatebook estimate` counts."""

import re
from pathlib import Path

from gatebook.book import prices
from gatebook.evidence import ledger, provenance
from gatebook.training.estimate import estimate
from gatebook.training.jobs import Job


def test_every_full_run_has_a_row(html: Path) -> None:
    page = (html / "book" / "scaling.html").read_text(encoding="utf-8")
    for slug in ledger.chapters(provenance.root()):
        assert f'<th scope="row">{slug}' in page


def test_a_row_is_the_estimate() -> None:
    chapter = ledger.load_chapter(provenance.root(), "swin")
    rows = {row[0]: row for row in prices._rows(chapter)}
    assert list(rows) == [f"swin, {arm}" for arm in chapter.scales["full"].settings["arms"]]
    price = estimate(Job(chapter="swin", arm="shifted"), gpu="H100")
    row = rows["swin, shifted"]
    assert float(row[2]) == float(f"{price.gpu_hours:.3g}")
    assert re.fullmatch(r"384\.31 million images", row[1])
