"""The table of prices on the page book/scaling: every full run, counted when the book is built."""

from pathlib import Path
from typing import Any

from gatebook.book.kernels import number, table
from gatebook.evidence import ledger
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


def prices(root: Path) -> str:
    """Every full run of the book, as a table in HTML."""
    rows = [row for slug in ledger.chapters(root) for row in _rows(ledger.load_chapter(root, slug))]
    share = f"{estimate.ASSUMED_MFU:.0%} of its peak"
    caption = (
        f"Full runs on one {estimate.ASSUMED_GPU}, taken to reach {share}; memory for the recipe's "
        "batch. A star: hours as the chapter gives them"
    )
    return table(caption, HEAD, rows)


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
