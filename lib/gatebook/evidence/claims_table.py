"""The table of claims at the end of a chapter: every claim at every scale, with its verdict."""

import html
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
        for name in ("claim", "scale", "verdict", "ours [95 % interval], seeds, rule", "where")
    )
    body = []
    for claim, scale, verdict, found, where in rows:
        if scale == "small":
            text = html.escape(f"{claim.id} ({claim.where}): {claim.statement}")
            paper = html.escape(claim.paper)
            body.append(
                f'<tr class="gb-claim"><th colspan="5" scope="rowgroup" style="text-align:left">'
                f"{text}<br><small>paper: {paper}</small></th></tr>"
            )
        if all(item.verdict == "not run" for item in found):
            ours = html.escape(ledger.why_not_run(chapter, claim, scale))
            where = ""
        else:
            ours = "<br>".join(html.escape(_line(item)) for item in found)
        key = verdict.replace(" ", "-")
        body.append(
            f'<tr><td>{claim.id}</td><td>{scale}</td><td><span class="gb-verdict gb-{key}">'
            f'{verdict}</span></td><td style="text-align:left">{ours}</td><td>{where}</td></tr>'
        )
    return (
        f'<table class="gb-claims"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _line(outcome: Any) -> str:
    text = f"{ledger.ours(outcome)} {ledger.interval_text(outcome)}"
    if outcome.test.direction != "equal":
        text += f", {outcome.seeds} seed(s)"
    note = f" — {outcome.note}" if outcome.note and outcome.estimate is not None else ""
    return f"{outcome.verdict}: {text}; rule: {outcome.rule}{note}"
