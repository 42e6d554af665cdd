"""The table of prices counts what `gatebook estimate` counts."""

import pickle
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


def test_the_page_is_read_again_when_prices_change(html: Path) -> None:
    with (html.parent / ".doctrees" / "environment.pickle").open("rb") as file:
        read = {Path(name).name for name in pickle.load(file).dependencies["book/scaling"]}
    assert {"prices.json", "gla.yml"} <= read


def test_kept_prices_are_up_to_date() -> None:
    """If not: `gatebook prices`. The book would count them again, which takes minutes."""
    assert prices.stale(provenance.root()) == []


def test_prices_are_kept_until_the_plan_changes(tmp_path: Path, monkeypatch) -> None:
    counted = []
    plan = {"hash": "one"}
    monkeypatch.setattr(prices, "_hash", lambda root, slug: plan["hash"])
    monkeypatch.setattr(prices.ledger, "load_chapter", lambda root, slug: slug)
    monkeypatch.setattr(prices.ledger, "chapters", lambda root: ["gla"])
    monkeypatch.setattr(prices, "_rows", lambda slug: counted.append(slug) or [(slug, "1")])
    (tmp_path / "results").mkdir()
    assert prices.stale(tmp_path) == ["gla"]
    prices.update(tmp_path, ["gla"])
    assert prices.kept_rows(tmp_path, "gla") == [["gla", "1"]]
    assert counted == ["gla"]
    plan["hash"] = "two"
    assert prices.stale(tmp_path) == ["gla"]
    assert prices.kept_rows(tmp_path, "gla") == [["gla", "1"]]
    assert counted == ["gla", "gla"]
    prices.path(tmp_path).write_text("{damaged")
    assert prices.kept_rows(tmp_path, "gla") == [["gla", "1"]]
    assert len(counted) == 3


def test_a_row_is_the_estimate() -> None:
    chapter = ledger.load_chapter(provenance.root(), "swin")
    rows = {row[0]: row for row in prices._rows(chapter)}
    assert list(rows) == [f"swin, {arm}" for arm in chapter.scales["full"].settings["arms"]]
    price = estimate(Job(chapter="swin", arm="shifted"), gpu="H100")
    row = rows["swin, shifted"]
    assert float(row[2]) == float(f"{price.gpu_hours:.3g}")
    assert re.fullmatch(r"384\.31 million images", row[1])
