"""Sphinx extension: chapter badges, the scoreboard and its summary, benchmarks, the API pages.

Everything is built from the ledger and the recorded benchmarks when the book is built. Pages are
read again when these have changed, so a partial build never shows an old verdict or number.
"""

import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

from gatebook.book import kernels, render
from gatebook.book.papers import entries, papers
from gatebook.errors import unknown
from gatebook.evidence import ledger
from gatebook.measure import records

CHAPTERS = "chapters/"
SCOREBOARD = "book/scoreboard"
KERNELS = "book/kernels"
TSV = "scoreboard.tsv"


class scoreboard_node(nodes.General, nodes.Element):  # noqa: N801 - docutils' convention
    """Placeholder for the scoreboard."""


class summary_node(nodes.General, nodes.Element):  # noqa: N801 - docutils' convention
    """Placeholder for the scoreboard's summary."""


class ScoreboardDirective(SphinxDirective):
    """``{scoreboard}``: the table of all papers and claims."""

    def run(self) -> list[nodes.Node]:
        """Leave a placeholder; the table is filled in when addresses are known."""
        return [scoreboard_node()]


class SummaryDirective(SphinxDirective):
    """``{scoreboard-summary}``: verdict counts and a strip of all papers."""

    def run(self) -> list[nodes.Node]:
        """Leave a placeholder; the summary is filled in when addresses are known."""
        return [summary_node()]


class kernels_node(nodes.General, nodes.Element):  # noqa: N801 - docutils' convention
    """Placeholder for a part of the page on kernels."""


class claims_node(nodes.General, nodes.Element):  # noqa: N801 - docutils' convention
    """Placeholder for some claims of a chapter."""


class KernelsDirective(SphinxDirective):
    """``{kernels} PART``: a table or figure from the recorded benchmarks."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Leave a placeholder; the part is filled in when the page is written."""
        part = self.arguments[0]
        if part not in kernels.PARTS:
            raise self.error(unknown("part", part, kernels.PARTS))
        return [kernels_node(part=part)]


class PricesDirective(SphinxDirective):
    """``{prices}``: what every full run costs."""

    def run(self) -> list[nodes.Node]:
        """The table; counting takes a minute, so it is made when its page is read."""
        from gatebook.book import prices

        root = _root(self.env.app)
        self.env.note_dependency(str(prices.path(root)))
        for slug in ledger.chapters(root):
            self.env.note_dependency(str(root / "chapters" / f"{slug}.yml"))
        return [nodes.raw("", prices.prices(root), format="html")]


class ClaimsDirective(SphinxDirective):
    """``{claims} SLUG C1 C2``: some claims of a chapter with their verdicts."""

    required_arguments = 2
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Leave a placeholder; the table is filled in when addresses are known."""
        slug, claims = self.arguments[0], self.arguments[1].split()
        chapter = ledger.load_chapter(Path(self.env.srcdir), slug)
        for claim in claims:
            chapter.claim(claim)  # raises if there is none
        return [claims_node(slug=slug, claims=claims)]


class ApiDirective(SphinxDirective):
    """``.. api:: PACKAGE`` (in a .rst page): every public module of a package, with its members.

    New modules appear by themselves, so a new chapter needs no edit of the API pages.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse one ``automodule`` section for each module."""
        lines = list(api_lines(self.arguments[0]))
        section = nodes.section()
        section.document = self.state.document
        nested_parse_with_titles(self.state, StringList(lines, "api"), section)
        return section.children


def public_modules(package: str) -> Iterator[str]:
    """Names of a package and its modules, none of which starts with an underscore.

    Args:
        package: Dotted name of a package or module.

    Yields:
        The package's own name if it documents or defines something, then its modules in
        alphabetical order.
    """
    module = importlib.import_module(package)
    yield package
    for found in sorted(
        pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda m: m.name
    ):
        if not found.name.startswith("_"):
            name = f"{package}.{found.name}"
            yield from public_modules(name) if found.ispkg else (name,)


def api_lines(package: str) -> Iterator[str]:
    """A page's reStructuredText: one section for each module of a package.

    A name that the package itself offers (its ``__all__``) is documented there and not again in
    the module that defines it.

    Args:
        package: Dotted name of a package or module.

    Yields:
        Lines.
    """
    offered = getattr(importlib.import_module(package), "__all__", [])
    for name in public_modules(package):
        yield from (name, "-" * len(name), "", f".. automodule:: {name}")
        yield "   :members:"
        if name != package and offered:
            yield f"   :exclude-members: {', '.join(offered)}"
        if name.rpartition(".")[2] in offered:  # the function and its module share a name
            yield "   :no-index:"
        yield ""


def escape_markup(text: str) -> str:
    """Escape what reStructuredText would read as markup in a docstring's prose and formulas.

    Args:
        text: A docstring, in which single or double backticks quote code.

    Returns:
        The text with ``*``, ``|`` and trailing underscores escaped outside of backticks, but for
        the star that starts a list item.
    """
    pieces = re.split(r"(`+[^`]*`+)", text)
    prose = r"(?<!\\)(?:(?<!^)(?<!^ {4})[*]|[|]|_(?=\W|$))"
    return "".join(
        piece if i % 2 else re.sub(prose, r"\\\g<0>", piece, flags=re.MULTILINE)
        for i, piece in enumerate(pieces)
    )


def _clean_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = escape_markup("\n".join(lines)).split("\n")


def _root(app: Sphinx) -> Path:
    return Path(app.srcdir)


def _claims(app: Sphinx) -> dict[str, list[render.ClaimLine]]:
    return render.claim_lines(_rows(app))


def _rows(app: Sphinx) -> list[dict[str, str]]:
    if not hasattr(app, "gatebook_rows"):
        app.gatebook_rows = ledger.rows(_root(app))
    return app.gatebook_rows


def _benchmarks(app: Sphinx) -> kernels.Results:
    if not hasattr(app, "gatebook_benchmarks"):
        app.gatebook_benchmarks = kernels.load(_root(app))
    return app.gatebook_benchmarks


def _outdated(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> Iterable[str]:
    """Read every page with verdicts or benchmarks again when these differ from the last build's."""
    measured = records.rows((*_benchmarks(app).gpu, *_benchmarks(app).cpu))
    shown = json.dumps([_rows(app), measured], sort_keys=True)
    digest = hashlib.sha256(shown.encode()).hexdigest()
    if getattr(env, "gatebook_digest", None) == digest:
        return []
    env.gatebook_digest = digest
    pages = {SCOREBOARD, KERNELS, app.config.root_doc}
    return [d for d in env.found_docs if d in pages or d.startswith(CHAPTERS)]


def _fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the badge and the tables into a page."""
    if app.builder.format != "html":
        return
    for node in doctree.findall(nodes.math_block):
        _keep_tags(node)
    if docname.startswith(CHAPTERS):
        _insert_badge(app, doctree, docname)
    for node in list(doctree.findall(scoreboard_node)):
        node.replace_self(_raw(_scoreboard(app, docname)))
    for node in list(doctree.findall(summary_node)):
        node.replace_self(_raw(_summary(app, docname)))
    for node in list(doctree.findall(kernels_node)):
        node.replace_self(_raw(kernels.PARTS[node["part"]](_benchmarks(app))))
    for node in list(doctree.findall(claims_node)):
        node.replace_self(_raw(_some_claims(app, docname, node["slug"], node["claims"])))


def _some_claims(app: Sphinx, docname: str, slug: str, claims: list[str]) -> str:
    lines = [line for line in _claims(app)[slug] if line.claim in claims]
    scoreboard = app.builder.get_relative_uri(docname, SCOREBOARD)
    return render.claims_table(lines, scoreboard=scoreboard)


def _keep_tags(node: nodes.math_block) -> None:
    """Show a numbered formula of several lines as Jupyter does.

    Sphinx puts formulas with line breaks into a ``split`` environment, where ``\\tag`` is an error.
    """
    text = node.astext()
    if r"\tag" in text and r"\\" in text:
        node["nowrap"] = True
        node[:] = [nodes.Text(rf"\[{text}\]")]


def _raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


def _insert_badge(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    slug = docname.removeprefix(CHAPTERS)
    chapter = ledger.load_chapter(_root(app), slug)
    html = render.badge(
        _claims(app).get(slug, []),
        scoreboard=app.builder.get_relative_uri(docname, SCOREBOARD),
        arxiv=chapter.arxiv,
        code=chapter.code,
    )
    title = next(iter(doctree.findall(nodes.title)))
    title.parent.insert(title.parent.index(title) + 1, _raw(html))


def _chapter_links(app: Sphinx, docname: str) -> Any:
    def link(slug: str) -> str | None:
        page = CHAPTERS + slug
        known = page in app.env.found_docs
        return app.builder.get_relative_uri(docname, page) if known else None

    return link


def _scoreboard(app: Sphinx, docname: str) -> str:
    links = _chapter_links(app, docname)
    return render.scoreboard(entries(), _claims(app), chapter_link=links, tsv=TSV)


def _summary(app: Sphinx, docname: str) -> str:
    return render.summary(
        papers(),
        _claims(app),
        chapter_link=_chapter_links(app, docname),
        scoreboard=app.builder.get_relative_uri(docname, SCOREBOARD),
    )


def _page_scripts(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Add the scoreboard's script, and drop thebe's: it would fetch code from a network."""
    if pagename == SCOREBOARD:
        app.add_js_file("scoreboard.js", loading_method="defer")
    context["script_files"] = [file for file in context["script_files"] if not _is_thebe(file)]


def _is_thebe(file: Any) -> bool:
    body = getattr(file, "attributes", {}).get("body") or ""
    return "thebe" in str(getattr(file, "filename", "")) or "THEBE_JS_URL" in body


def _write_tsv(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        path = Path(app.outdir) / Path(SCOREBOARD).parent / TSV
        path.write_text(ledger.tsv(_rows(app)), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and events."""
    for node in (scoreboard_node, summary_node, kernels_node, claims_node):
        app.add_node(node, **{b: (_skip, None) for b in ("latex", "text", "man", "texinfo")})
    app.add_directive("scoreboard", ScoreboardDirective)
    app.add_directive("scoreboard-summary", SummaryDirective)
    app.add_directive("kernels", KernelsDirective)
    app.add_directive("prices", PricesDirective)
    app.add_directive("claims", ClaimsDirective)
    app.add_directive("api", ApiDirective)
    app.connect("env-get-outdated", _outdated)
    app.connect("autodoc-process-docstring", _clean_docstring, priority=400)  # before napoleon
    app.connect("doctree-resolved", _fill)
    app.connect("html-page-context", _page_scripts, priority=900)
    app.connect("build-finished", _write_tsv)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _skip(visitor: Any, node: nodes.Node) -> None:
    raise nodes.SkipNode
