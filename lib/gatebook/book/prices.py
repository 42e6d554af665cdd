"""The table of prices on the page book/scaling: what every full run costs.

Counting takes minutes for large models, so `gatebook prices` keeps the rows in results/prices.json,
each chapter's with a hash of what they were counted from. The book counts again what has no row.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from gatebook.book.tables import number, table
from gatebook.evidence import ledger, provenance
from gatebook.training import estimate
from gatebook.training.jobs import Job

HEAD = (
    "run",
    "work",
    "GPU-hours",
    "memory [GiB]",
    "recomputed [GiB]",
    "data [GB]",
)
COUNTED = tuple(
    f"gatebook.{part}" for part in ("kernels", "layers", "measure.cost", "models", "training")
)


def prices(root: Path) -> str:
    """Every full run of the book, as a table in HTML."""
    rows = [tuple(row) for slug in ledger.chapters(root) for row in kept_rows(root, slug)]
    share = f"{estimate.ASSUMED_MFU:.0%} of its peak"
    caption = (
        f"Full runs on one {estimate.ASSUMED_GPU}, taken to reach {share}; memory for the recipe's "
        "batch. A star: hours as the chapter gives them"
    )
    return table(caption, HEAD, rows)


def path(root: Path) -> Path:
    """Where the rows are kept."""
    return root / "results" / "prices.json"


def kept_rows(root: Path, slug: str) -> list[list[str]]:
    """The rows of a chapter, as kept if they are counted from what is there now, else anew."""
    entry = _read(root).get(slug, {})
    if entry.get("hash") == _hash(root, slug):
        return entry["rows"]
    return [list(row) for row in _rows(ledger.load_chapter(root, slug))]


def stale(root: Path) -> list[str]:
    """Chapters whose rows have to be counted again."""
    kept = _read(root)
    return [s for s in ledger.chapters(root) if kept.get(s, {}).get("hash") != _hash(root, s)]


def update(root: Path, slugs: list[str]) -> None:
    """Count the rows of chapters and keep them, with those of the others that still exist."""
    kept = {slug: entry for slug, entry in _read(root).items() if slug in ledger.chapters(root)}
    for slug in slugs:
        rows = [list(row) for row in _rows(ledger.load_chapter(root, slug))]
        kept[slug] = {"hash": _hash(root, slug), "rows": rows}
        text = json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n"
        path(root).write_text(text, encoding="utf-8")


def _read(root: Path) -> dict[str, Any]:
    try:
        found = json.loads(path(root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hash(root: Path, slug: str) -> str:
    """Of the full scale, and of the code that models are made of and counted with."""
    plan = ledger.load_chapter(root, slug).scales["full"].model_dump_json()
    cells = "\n".join(provenance.code_cells(root / "chapters" / f"{slug}.ipynb"))
    counting = f"{cells}\nimport gatebook.training.estimate\nimport gatebook.training.jobs\n"
    digest = hashlib.sha256(plan.encode())
    for name, file in sorted(provenance.imported_modules(counting).items()):
        if name.startswith(COUNTED):
            digest.update(name.encode() + provenance.essence_of_file(file).encode())
    return digest.hexdigest()[:16]


def _rows(chapter: Any) -> list[tuple[str, ...]]:
    plan = chapter.scales["full"]

    def job(arm: str) -> Job:
        return Job(chapter=chapter.slug, arm=arm)

    data = "–" if plan.data_gb is None else number(plan.data_gb)
    rows = [
        (
            f"{chapter.slug}, {price.job.arm}",
            f"{estimate.big(price.units)} {price.unit}",
            number(price.gpu_hours),
            number(price.memory["plain"]),
            number(price.memory["recomputed"]),
            data,
        )
        for price in estimate.of_chapter(chapter, job=job, gpu=estimate.ASSUMED_GPU)
    ]
    if rows or not plan.gpu_hours:
        return rows
    return [(chapter.slug, "–", f"{number(plan.gpu_hours)} *", "–", "–", data)]
