"""The table of claims at the end of a chapter: every claim at every scale, with its verdict."""

import html
import itertools
from typing import Any

from gatebook.evidence import ledger, provenance, verdicts
from gatebook.evidence.schema import SCALES


def of_run(run: Any) -> str:
    """The table of a `gatebook.Run`: its own scale as observed, the others as recorded."""
    others = {
        scale: ledger.read(run.root, run.chapter.slug, scale)
        for scale in SCALES
        if scale != run.scale
    }
    now = provenance.hardware_line(provenance.hardware(run.device))
    rows = []
    for claim in run.chapter.claims:
        for scale in SCALES:
            evidence = others.get(scale)
            found = (
                verdicts.claim_outcomes(claim, scale, run.observations)
                if scale == run.scale
                else ledger.outcomes(claim, scale, evidence)
            )
            where = f"{now}, this run" if scale == run.scale else _where(evidence)
            rows.append((claim, scale, verdicts.combine(found), found, where))
    return _table(run.chapter, rows)


def _where(evidence: Any) -> str:
    if evidence is None:
        return ""
    data = evidence.data
    note = f", recorded at commit {data['commit']}, code changed since" if evidence.stale else ""
    return f"{provenance.hardware_line(data['hardware'])}, {data['date'][:10]}{note}"


def _table(chapter: Any, rows: list[tuple[Any, str, str, list[Any], str]]) -> str:
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("scale", "verdict", "ours [95 % interval], seeds; the rule", "where")
    )
    body = []
    for claim, of_claim in itertools.groupby(rows, key=lambda row: row[0]):
        body.append(
            f'<tr class="gb-claim"><th colspan="4" scope="rowgroup" style="text-align:left">'
            f"{html.escape(f'{claim.id} ({claim.where}): {claim.statement}')}"
            f"<br><small>paper: {html.escape(claim.paper)}</small></th></tr>"
        )
        missing: dict[str, list[str]] = {}  # reason -> scales
        for _, scale, verdict, found, where in of_claim:
            if all(item.verdict == "not run" for item in found):
                missing.setdefault(ledger.reason(claim, scale), []).append(scale)
            else:
                ours = "".join(f"<div>{_line(item)}</div>" for item in found)
                body.append(_row(scale, verdict, ours, where))
        for reason, scales in missing.items():
            price = ledger.price(chapter, claim) if "full" in scales else ""
            text = f"{reason.rstrip('.')}; price at full: {price}" if price else reason
            body.append(_row(", ".join(scales), "not run", html.escape(text), ""))
    return (
        f'<table class="gb-claims"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _row(scale: str, verdict: str, ours: str, where: str) -> str:
    key = verdict.replace(" ", "-")
    return (
        f'<tr><td>{scale}</td><td><span class="gb-verdict gb-{key}">{verdict}</span></td>'
        f'<td style="text-align:left">{ours}</td><td>{where}</td></tr>'
    )


def _line(outcome: Any) -> str:
    """What was found, and below it the rule with what it says."""
    text = f"{ledger.ours(outcome)} {ledger.interval_text(outcome)}"
    if outcome.test.by_chance:
        text += f", {outcome.seeds} seed{'s' * (outcome.seeds != 1)}"
    note = f" — {outcome.note}" if outcome.note and outcome.estimate is not None else ""
    rule = f"{outcome.rule}: {outcome.verdict}{note}"
    return f"{html.escape(text)}<br><small>{html.escape(rule)}</small>"
