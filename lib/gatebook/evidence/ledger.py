"""Recorded evidence: `results/SLUG/SCALE.json`, written whole or not at all, checked on reading."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gatebook.errors import unknown
from gatebook.evidence import provenance, schema, verdicts
from gatebook.evidence.schema import SCALES, Chapter, Claim, Test
from gatebook.evidence.verdicts import Outcome

COLUMNS = (
    "chapter",
    "claim",
    "statement",
    "scale",
    "verdict",
    "ours",
    "interval",
    "paper",
    "seeds",
    "hardware",
    "date",
    "commit",
    "stale",
)
FIELDS = (
    "chapter",
    "scale",
    "seed",
    "observations",
    "tests",
    "claims",
    "settings",
    "command",
    "commit",
    "hash",
    "versions",
    "hardware",
    "date",
    "wall_seconds",
    "peak_memory_mb",
)
LOCK_SECONDS = 30


class EvidenceError(RuntimeError):
    """An evidence file is damaged, or could not be written; nothing was overwritten."""


@dataclass(frozen=True)
class Evidence:
    """A recorded run, and whether the code has changed since."""

    data: dict[str, Any]
    stale: bool


def chapters(root: Path) -> list[str]:
    """Slugs of the chapters that exist, sorted."""
    return sorted(path.stem for path in (root / "chapters").glob("*.yml"))


def load_chapter(root: Path, slug: str) -> Chapter:
    """A chapter's claims.

    Raises:
        ValueError: there is no such chapter, or its `.yml` is malformed.
    """
    path = root / "chapters" / f"{slug}.yml"
    if not path.is_file():
        raise ValueError(unknown("chapter", slug, chapters(root)))
    return schema.load(path)


def evidence_path(root: Path, slug: str, scale: str) -> Path:
    """Where the evidence of a chapter and scale lies."""
    return root / "results" / slug / f"{scale}.json"


def write(root: Path, body: dict[str, Any]) -> Path:
    """Record a run. The file is replaced in one step, under a lock; a damaged old one is kept.

    Raises:
        EvidenceError: no space, no permission, or another run holds the lock for 30 s. The old
            evidence is untouched.
    """
    path = evidence_path(root, body["chapter"], body["scale"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_path(root), timeout=LOCK_SECONDS):
            _set_aside_if_damaged(path)
            _replace(path, json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n")
    except Timeout:
        raise EvidenceError(f"another run is recording {path.name}; nothing was written") from None
    except OSError as error:
        raise EvidenceError(
            f"could not write results/{body['chapter']}/{path.name}: {error.strerror}; "
            "the old evidence is untouched"
        ) from error
    return path


@contextlib.contextmanager
def restored_on_failure(root: Path, slug: str, scale: str) -> Iterator[None]:
    """Put the old evidence back, or none, when what is done meanwhile fails or is interrupted.

    So evidence and stored outputs are replaced together or not at all. The old file is copied
    beforehand: putting it back needs no space.

    Raises:
        EvidenceError: the copy could not be written; nothing has begun then.
    """
    path = evidence_path(root, slug, scale)
    before = path.with_name(f".{path.name}.{os.getpid()}.before")
    try:
        try:
            if path.exists():
                shutil.copy2(path, before)
        except OSError as error:
            raise EvidenceError(
                f"could not copy results/{slug}/{path.name} before the run: {error.strerror}"
            ) from error
        try:
            yield
        except BaseException:
            if before.exists():
                os.replace(before, path)
            else:
                path.unlink(missing_ok=True)
            raise
    finally:
        with contextlib.suppress(OSError):
            before.unlink(missing_ok=True)


def lock_path(root: Path) -> Path:
    """The lock that a run holds while it records. It is never deleted: others may wait for it."""
    return root / "results" / ".lock"


def read(root: Path, slug: str, scale: str) -> Evidence | None:
    """The recorded evidence, or None when there is none.

    Raises:
        EvidenceError: the file is half-written, edited, not shaped like evidence, belongs to
            another chapter or scale, or holds a verdict that its own numbers and rules do not
            give.
    """
    path = evidence_path(root, slug, scale)
    if not path.exists():
        return None
    data = _verified(path)
    return Evidence(data, stale=data["hash"] != provenance.chapter_hash(root, slug, scale))


def outcomes(claim: Claim, scale: str, evidence: Evidence | None) -> list[Outcome]:
    """Outcomes of a claim's tests by the rules in force now, on the recorded numbers."""
    return verdicts.claim_outcomes(claim, scale, evidence.data["observations"] if evidence else {})


def rows(root: Path, slugs: Iterable[str] | None = None) -> list[dict[str, str]]:
    """The ledger: one row of strings for each claim and scale, in the order of `COLUMNS`."""
    table = []
    for slug in chapters(root) if slugs is None else slugs:
        chapter = load_chapter(root, slug)
        found = {scale: read(root, slug, scale) for scale in SCALES}
        for claim in chapter.claims:
            for scale in SCALES:
                table.append(_row(chapter, claim, scale, found[scale]))
    return table


def tsv(table: list[dict[str, str]]) -> str:
    """Ledger rows as tab-separated text with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: " ".join(row[key].split()) for key in COLUMNS} for row in table)
    return out.getvalue()


def test_record(test: Test, outcome: Outcome) -> dict[str, Any]:
    """A test's definition and what it found, as stored in the evidence."""
    return {
        "definition": test.model_dump(exclude_defaults=True),
        "verdict": outcome.verdict,
        "estimate": outcome.estimate,
        "interval": [outcome.low, outcome.high],
        "seeds": outcome.seeds,
        "rule": outcome.rule,
        "note": outcome.note,
    }


def number(value: float | None, unit: str = "") -> str:
    """A number to four significant digits; counts in full with thousands separators."""
    if value is None:
        return "–"
    if unit == "count" or (float(value).is_integer() and abs(value) >= 10_000):
        return f"{round(value):,}"
    return f"{value:.4g}"


def ours(outcome: Outcome) -> str:
    """Our number for a test, with its metric and unit."""
    test = outcome.test
    if outcome.estimate is None:
        return outcome.note or "not observed"
    side = {"difference": " − ", "ratio": " / "}.get(test.statistic)
    name = test.left if side is None else f"{test.left}{side}{test.right}"
    unit = "×" if test.statistic == "ratio" else "" if test.unit == "count" else f" {test.unit}"
    return f"{test.metric} {name}: {number(outcome.estimate, test.unit)}{unit}"


def interval_text(outcome: Outcome) -> str:
    """The 95 % interval in brackets, or `exact`."""
    if not outcome.test.by_chance:
        return "exact"
    if outcome.low is None:
        return "–"
    return f"[{number(outcome.low)}, {number(outcome.high)}]"


def why_not_run(chapter: Chapter, claim: Claim, scale: str) -> str:
    """Why a claim has no evidence at a scale, and what it would cost."""
    cost = price(chapter, claim) if scale == "full" else ""
    why = reason(claim, scale)
    return f"{why.rstrip('.')}; price: {cost}" if cost else why


def reason(claim: Claim, scale: str) -> str:
    """Why a claim has no evidence at a scale."""
    if any(scale in test.scales for test in claim.tests):
        return "planned, not recorded yet"
    return claim.not_tested or f"no test at {scale}"


def price(chapter: Chapter, claim: Claim) -> str:
    """What testing a claim at `full` would cost; empty if nothing is known."""
    if claim.price or not any("full" in test.scales for test in claim.tests):
        return claim.price
    plan = chapter.scales["full"]
    hours = f"{plan.gpu_hours:g} GPU-hours" if plan.gpu_hours else ""
    data = f"{plan.data_gb:g} GB of data" if plan.data_gb else ""
    return ", ".join(filter(None, (hours, data)))


def _row(chapter: Chapter, claim: Claim, scale: str, evidence: Evidence | None) -> dict[str, str]:
    found = outcomes(claim, scale, evidence)
    verdict = verdicts.combine(found)
    ran = evidence is not None and any(item.verdict != "not run" for item in found)
    data = evidence.data if ran and evidence else {}
    return {
        "chapter": chapter.slug,
        "claim": claim.id,
        "statement": claim.statement,
        "scale": scale,
        "verdict": verdict,
        "ours": "; ".join(map(ours, found)) if ran else why_not_run(chapter, claim, scale),
        "interval": "; ".join(map(interval_text, found)) if ran else "",
        "paper": claim.paper,
        "seeds": str(max((item.seeds for item in found), default=0)) if ran else "",
        "hardware": provenance.hardware_line(data["hardware"]) if ran else "",
        "date": data["date"][:10] if ran else "",
        "commit": data["commit"] if ran else "",
        "stale": ("yes" if evidence.stale else "no") if ran and evidence else "",
    }


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps({key: body[key] for key in body if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _verified(path: Path) -> dict[str, Any]:
    name = f"results/{path.parent.name}/{path.name}"
    try:
        return _checked(name, path)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvidenceError(f"{name} is damaged or half-written ({problem}); {_REMEDY}") from None


def _checked(name: str, path: Path) -> dict[str, Any]:
    """What the file holds; errors of any other kind mean that it is not shaped like evidence."""
    data = json.loads(path.read_text(encoding="utf-8"))
    missing = [field for field in (*FIELDS, "checksum") if field not in data]
    if missing:
        raise EvidenceError(f"{name} lacks {missing}; {_REMEDY}")
    if (data["chapter"], data["scale"]) != (path.parent.name, path.stem):
        raise EvidenceError(
            f"{name} is the evidence of {data['chapter']} at {data['scale']}; {_REMEDY}"
        )
    for test_id, record in data["tests"].items():
        again = verdicts.evaluate(Test.model_validate(record["definition"]), data["observations"])
        if again.verdict != record["verdict"]:
            raise EvidenceError(
                f"{name}: test {test_id} says {record['verdict']!r}, but its rule gives "
                f"{again.verdict!r} on the recorded numbers; {_REMEDY}"
            )
    if _checksum(data) != data["checksum"]:
        raise EvidenceError(f"{name} was edited after it was recorded; {_REMEDY}")
    return data


_REMEDY = "refused and left as it is: record the run again, the damaged file is then kept aside"


def _set_aside_if_damaged(path: Path) -> None:
    if not path.exists():
        return
    try:
        _verified(path)
    except EvidenceError:
        path.rename(path.with_name(f"{path.stem}.damaged-{time.time_ns()}.json"))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
