"""The ledger as HTML: a chapter's badge, the scoreboard and its summary.

Everything here is a function from ledger rows to text. No verdict, number or date comes from
anywhere else.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from gatebook.book.papers import Paper

SCALES = ("small", "medium", "full")
SYMBOLS = {
    "reproduced": "≡",
    "supported": "✓",
    "contradicted": "✗",
    "inconclusive": "~",
    "not run": "–",
}
VERDICTS = tuple(SYMBOLS)
PLANNED = "planned"
SHORT_REASON = 60  # characters; a longer reason for "not run" folds away
SHOWN_NUMBERS = 2  # of a claim's tests at one scale; the rest fold away

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ClaimLine:
    """One claim of a chapter with its ledger row at each scale."""

    chapter: str
    claim: str
    statement: str
    paper: str
    scales: Mapping[str, Row]

    @property
    def anchor(self) -> str:
        """Where the scoreboard shows this claim."""
        return f"{self.chapter}-{self.claim}"

    @property
    def newest(self) -> Row | None:
        """The row with the newest evidence, or None when nothing ran."""
        ran = [row for row in self.scales.values() if row["date"]]
        return max(ran, key=lambda row: row["date"], default=None)

    @property
    def best(self) -> str:
        """The verdict at the largest scale that was run, ``not run`` when none was."""
        verdicts = [self.verdict(scale) for scale in reversed(SCALES)]
        return next((v for v in verdicts if v != "not run"), "not run")

    def verdict(self, scale: str) -> str:
        """The verdict at one scale."""
        return self.scales[scale]["verdict"] if scale in self.scales else "not run"


def claim_lines(rows: Iterable[Row]) -> dict[str, list[ClaimLine]]:
    """Group ledger rows by chapter and claim.

    Args:
        rows: Rows of `gatebook.evidence.ledger.rows`, one for each claim and scale.

    Returns:
        The claims of each chapter, by slug, in the rows' order.
    """
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["chapter"], row["claim"]), []).append(row)
    chapters: dict[str, list[ClaimLine]] = {}
    for (chapter, claim), same in grouped.items():
        line = ClaimLine(
            chapter=chapter,
            claim=claim,
            statement=same[0]["statement"],
            paper=same[0]["paper"],
            scales={row["scale"]: row for row in same},
        )
        chapters.setdefault(chapter, []).append(line)
    return chapters


# --- pieces ---------------------------------------------------------------------------------


def _class(verdict: str) -> str:
    return "gb-" + verdict.replace(" ", "-")


def verdict_pill(verdict: str, prefix: str = "") -> str:
    """A verdict as a coloured word with its symbol; `prefix` is usually the scale."""
    before = f'<span class="gb-scale">{escape(prefix)}</span> ' if prefix else ""
    symbol = f'<span aria-hidden="true">{SYMBOLS.get(verdict, "·")}</span>'
    return f'<span class="gb-v {_class(verdict)}">{before}{symbol} {escape(verdict)}</span>'


def _link(href: str, text: str) -> str:
    return f'<a href="{escape(href)}">{escape(text)}</a>'


def arxiv_link(arxiv: str | None) -> str:
    """A link to the paper, if there is one."""
    if not arxiv:
        return ""
    return _link(f"https://arxiv.org/abs/{arxiv}", f"arXiv:{arxiv}")


# --- the badge at the head of a chapter -----------------------------------------------------


def badge(
    lines: Sequence[ClaimLine], *, scoreboard: str, arxiv: str | None, code: Sequence[str] = ()
) -> str:
    """The box under a chapter's title: each claim's verdict at each scale.

    Args:
        lines: The chapter's claims.
        scoreboard: Address of the scoreboard, relative to the chapter.
        arxiv: The paper's arXiv identifier; None for a comparison of the book's own.
        code: Addresses of the code that the authors published.

    Returns:
        HTML.
    """
    pills = "".join(_badge_pill(line, scoreboard) for line in lines)
    links = [_link(scoreboard + f"#{lines[0].chapter}", "scoreboard") if lines else ""]
    links += [arxiv_link(arxiv), *(_link(url, "authors’ code") for url in code[:1])]
    return (
        '<aside class="gb-badge" aria-label="Verdicts of this chapter">'
        f'<ul class="gb-pills">{pills}</ul>'
        f'<p class="gb-meta">{_provenance(lines)} '
        f"<span>{' · '.join(filter(None, links))}</span></p></aside>"
    )


def _badge_pill(line: ClaimLine, scoreboard: str) -> str:
    verdicts = "".join(verdict_pill(line.verdict(scale), scale) for scale in SCALES)
    statement = escape(line.statement)
    return (
        f'<li class="gb-pill">{_link(f"{scoreboard}#{line.anchor}", line.claim)} '
        f'<span class="gb-statement" title="{statement}">{statement}</span>'
        f'<span class="gb-verdicts">{verdicts}</span></li>'
    )


def _provenance(lines: Sequence[ClaimLine]) -> str:
    newest = max(
        (row for line in lines if (row := line.newest)), key=lambda r: r["date"], default=None
    )
    if newest is None:
        return "<span>No evidence recorded yet.</span>"
    stale = any(row["stale"] == "yes" for line in lines for row in line.scales.values())
    changed = ' <strong class="gb-stale">Code changed since.</strong>' if stale else ""
    return (
        f"<span>Newest evidence: {escape(newest['date'][:10])}, {escape(newest['hardware'])}, "
        f"{escape(newest['scale'])} scale.{changed}</span>"
    )


# --- the scoreboard -------------------------------------------------------------------------

COLUMNS = ("paper", "claim", "paper’s figure", *SCALES, "newest run")


def scoreboard(
    papers: Sequence[Paper],
    chapters: Mapping[str, Sequence[ClaimLine]],
    *,
    chapter_link: Callable[[str], str | None],
    tsv: str,
) -> str:
    """The table of all papers and claims, with its filter form.

    Args:
        papers: The papers, in reading order.
        chapters: Their claims, by slug; a paper without any is shown as planned.
        chapter_link: The address of a chapter's page, or None where there is no page.
        tsv: Address of the same ledger as tab-separated values.

    Returns:
        HTML. Filter and sort are done by ``scoreboard.js``; without it, the table is complete.
    """
    parts = list(dict.fromkeys(paper.part for paper in papers))
    bodies = "".join(
        _part_body(part, [p for p in papers if p.part == part], chapters, chapter_link)
        for part in parts
    )
    return (
        f'<div class="gb-scoreboard">{_filter_form(parts, tsv)}'
        '<div class="gb-scroll" role="region" aria-label="Scoreboard" tabindex="0">'
        '<table class="gb-table"><caption class="gb-hidden">Every paper and claim with its '
        f"verdict at each scale</caption><thead><tr>{_header_cells()}</tr></thead>"
        f"{bodies}</table></div></div>"
    )


def _header_cells() -> str:
    return "".join(
        f'<th scope="col" data-column="{name}"><button type="button" class="gb-sort">'
        f'{name}<span aria-hidden="true" class="gb-arrow"></span></button></th>'
        for name in COLUMNS
    )


def _select(name: str, label: str, anything: str, options: Iterable[str]) -> str:
    items = "".join(f'<option value="{escape(o)}">{escape(o)}</option>' for o in options)
    return (
        f'<label>{label} <select name="{name}"><option value="">{anything}</option>'
        f"{items}</select></label>"
    )


def _filter_form(parts: Sequence[str], tsv: str) -> str:
    return (
        '<form class="gb-filter" hidden><label>Search '
        '<input type="search" name="text" placeholder="words in any column"></label>'
        + _select("part", "Part", "all parts", parts)
        + _select("verdict", "Verdict", "any verdict", (*VERDICTS, PLANNED))
        + _select("scale", "Scale", "all scales", SCALES)
        + '<button type="reset">Reset</button></form><p class="gb-count">'
        f'<span aria-live="polite"></span> <a href="{escape(tsv)}" download>'
        "Download scoreboard.tsv</a></p>"
    )


def _part_body(
    part: str,
    papers: Sequence[Paper],
    chapters: Mapping[str, Sequence[ClaimLine]],
    chapter_link: Callable[[str], str | None],
) -> str:
    rows = "".join(_paper_rows(p, chapters.get(p.slug, ()), chapter_link(p.slug)) for p in papers)
    head = f'<tr class="gb-part"><th scope="rowgroup" colspan="{len(COLUMNS)}">{escape(part)}</th>'
    return f'<tbody data-part="{escape(part)}">{head}</tr>{rows}</tbody>'


def _paper_rows(paper: Paper, lines: Sequence[ClaimLine], link: str | None) -> str:
    name = _link(link, paper.slug) if link else escape(paper.slug)
    thin = " · body not read" if paper.thin else ""
    title = f'<span class="gb-title">{escape(paper.title)}</span>'
    source = f'<span class="gb-small gb-source">{arxiv_link(paper.arxiv)}{thin}</span>'
    if not lines:
        return (
            f'<tr id="{paper.slug}" data-verdicts="{PLANNED}" class="gb-planned-row">'
            f'<th scope="row" data-sort="{paper.slug}">{name} {source}</th>'
            f'<td colspan="{len(COLUMNS) - 1}">{title} '
            f'<span class="gb-v gb-planned">{PLANNED}</span></td></tr>'
        )
    head = f"{name} {title} {source}"
    return "".join(_claim_row(line, head, first=i == 0) for i, line in enumerate(lines))


def _claim_row(line: ClaimLine, paper: str, *, first: bool) -> str:
    verdicts = " ".join(f'data-{scale}="{line.verdict(scale)}"' for scale in SCALES)
    newest = line.newest
    date = newest["date"] if newest else ""
    run = (
        f"{escape(date[:10])}<span class='gb-small'>{escape(newest['scale'])}</span>"
        if newest
        else '<span class="gb-small">never</span>'
    )
    shown = ' class="gb-titled"' if first else ""  # the script moves this when it filters
    anchor = f'<span id="{line.chapter}"></span>' if first else ""
    return (
        f'<tr id="{escape(line.anchor)}"{shown} {verdicts}>'
        f'<th scope="row" data-label="paper" data-sort="{line.chapter}">{anchor}{paper}</th>'
        f'<td data-label="claim"><strong>{escape(line.claim)}</strong> '
        f"{escape(line.statement)}</td>"
        f'<td data-label="paper’s figure">{escape(line.paper)}</td>'
        + "".join(_scale_cell(line, scale) for scale in SCALES)
        + f'<td data-label="newest run" data-sort="{escape(date)}">{run}</td></tr>'
    )


def _scale_cell(line: ClaimLine, scale: str) -> str:
    verdict = line.verdict(scale)
    row = line.scales.get(scale)
    rank = VERDICTS.index(verdict) if verdict in VERDICTS else len(VERDICTS)
    detail = "" if row is None else _not_run(row) if verdict == "not run" else _measured(row)
    return (
        f'<td data-label="{scale}" data-scale="{scale}" data-sort="{rank}">'
        f"{verdict_pill(verdict)}{detail}</td>"
    )


def _not_run(row: Row) -> str:
    reason = escape(row["ours"])
    if len(row["ours"]) <= SHORT_REASON:
        return f'<span class="gb-small">{reason}</span>'
    label = f"why {row['chapter']} {row['claim']} was not run at {row['scale']} scale"
    summary = f'<summary aria-label="{escape(label)}">why</summary>'
    return f'<details class="gb-small">{summary}{reason}</details>'


def _measured(row: Row) -> str:
    facts = [f"{row['seeds']} seeds" if row["seeds"] else "", row["hardware"], row["date"][:10]]
    stale = ' <strong class="gb-stale">code changed since</strong>' if row["stale"] == "yes" else ""
    small = escape(" · ".join(filter(None, facts)))
    return f'{_numbers(row)}<span class="gb-small">{small}{stale}</span>'


def _numbers(row: Row) -> str:
    """Our numbers, one line for each test; those after the first few fold away."""
    ours, intervals = row["ours"].split("; "), row["interval"].split("; ")
    if len(ours) == len(intervals):
        ours = [f"{number} {interval}" for number, interval in zip(ours, intervals, strict=True)]
    lines = [f'<span class="gb-ours">{escape(line)}</span>' for line in ours]
    shown, folded = "".join(lines[:SHOWN_NUMBERS]), "".join(lines[SHOWN_NUMBERS:])
    if not folded:
        return shown
    count = len(lines) - SHOWN_NUMBERS
    label = f"{count} more for {row['chapter']} {row['claim']}, {row['scale']} scale"
    summary = f'<summary aria-label="{escape(label)}">{count} more</summary>'
    return f'{shown}<details class="gb-small">{summary}{folded}</details>'


# --- some claims on another page --------------------------------------------------------------


def claims_table(lines: Iterable[ClaimLine], *, scoreboard: str) -> str:
    """Some claims with their verdicts, as on the scoreboard.

    Args:
        lines: The claims.
        scoreboard: Address of the scoreboard.

    Returns:
        HTML.
    """
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "paper’s figure", *SCALES))
    rows = "".join(
        f'<tr><th scope="row" data-label="claim">'
        f"{_link(f'{scoreboard}#{line.anchor}', f'{line.chapter} {line.claim}')} "
        f"{escape(line.statement)}</th>"
        f'<td data-label="paper’s figure">{escape(line.paper)}</td>'
        + "".join(_scale_cell(line, scale) for scale in SCALES)
        + "</tr>"
        for line in lines
    )
    return (
        '<div class="gb-scroll" role="region" aria-label="Claims" tabindex="0">'
        f'<table class="gb-table gb-some-claims"><caption class="gb-hidden">Claims with their '
        f"verdict at each scale</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


# --- the summary on the first page ----------------------------------------------------------


def summary(
    papers: Sequence[Paper],
    chapters: Mapping[str, Sequence[ClaimLine]],
    *,
    chapter_link: Callable[[str], str | None],
    scoreboard: str,
) -> str:
    """Verdict counts and a strip of all papers, one cell each.

    Args:
        papers: The papers, in reading order.
        chapters: Their claims, by slug.
        chapter_link: The address of a chapter's page, or None where there is no page.
        scoreboard: Address of the scoreboard.

    Returns:
        HTML. A claim counts with its verdict at the largest scale that was run.
    """
    parts = list(dict.fromkeys(paper.part for paper in papers))
    strips = "".join(
        _strip(part, [p for p in papers if p.part == part], chapters, chapter_link, scoreboard)
        for part in parts
    )
    return (
        f'<div class="gb-summary">{_counts(papers, chapters, scoreboard)}'
        f'<div class="gb-strips">{strips}</div></div>'
    )


def _counts(
    papers: Sequence[Paper], chapters: Mapping[str, Sequence[ClaimLine]], scoreboard: str
) -> str:
    lines = [line for paper in papers for line in chapters.get(paper.slug, ())]
    best = Counter(line.best for line in lines)
    done = sum(paper.slug in chapters for paper in papers)
    items = "".join(
        f'<li><a class="gb-v {_class(v)}" href="{escape(scoreboard)}?verdict='
        f'{v.replace(" ", "+")}"><span aria-hidden="true">{SYMBOLS[v]}</span> '
        f"<strong>{best[v]}</strong> {v}</a></li>"
        for v in VERDICTS
    )
    return (
        f'<p class="gb-lead"><strong>{done}</strong> of {len(papers)} papers, '
        f"<strong>{len(lines)}</strong> claims. Each claim counts once, with its verdict at the "
        f'largest scale that was run.</p><ul class="gb-counts">{items}</ul>'
    )


def _strip(
    part: str,
    papers: Sequence[Paper],
    chapters: Mapping[str, Sequence[ClaimLine]],
    chapter_link: Callable[[str], str | None],
    scoreboard: str,
) -> str:
    cells = "".join(
        _cell(p, chapters.get(p.slug, ()), chapter_link(p.slug) or f"{scoreboard}#{p.slug}")
        for p in papers
    )
    return (
        f'<div class="gb-strip"><p class="gb-strip-name">{escape(part)}</p><ul>{cells}</ul></div>'
    )


def _cell(paper: Paper, lines: Sequence[ClaimLine], href: str) -> str:
    counts = Counter(line.best for line in lines)
    text = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or PLANNED
    bar = "".join(
        f'<i class="{_class(v)}" style="flex:{counts[v]}"></i>' for v in VERDICTS if counts[v]
    )
    state = "" if lines else " gb-cell-planned"
    return (
        f'<li><a class="gb-cell{state}" href="{escape(href)}" '
        f'title="{escape(paper.title)}: {text}">{escape(paper.slug)}'
        f'<span class="gb-hidden">: {text}</span>'
        f'<span class="gb-bar" aria-hidden="true">{bar}</span></a></li>'
    )
