"""Numbers and tables of the pages, as HTML."""

from collections.abc import Sequence
from html import escape


def number(value: float | None) -> str:
    """Three significant digits, trailing zeros too; without an exponent where that is readable."""
    if value is None:
        return "–"
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def times(value: float) -> str:
    """How many times better, to two digits."""
    return f"{value:.0f} ×" if value >= 9.95 else f"{value:.{1 if value >= 1 else 2}f} ×"


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "gb-numbers"
) -> str:
    """A table with a caption; each row's first cell is its head. Cells are plain text."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="gb-scroll" role="region" aria-label="{label}" tabindex="0">'
        f'<table class="{style}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def fold(summary: str, html: str) -> str:
    """Something long behind one line that opens it."""
    return f'<details class="gb-fold"><summary>{escape(summary)}</summary>{html}</details>'
