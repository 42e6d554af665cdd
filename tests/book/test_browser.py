"""The book in a real browser: nothing fails, nothing leaves the machine, all can be read."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from axe_playwright_python.sync_playwright import Axe

from gatebook.book.papers import entries

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
PAGES = [
    "book/intro.html",
    "book/how-to-read.html",
    "book/scoreboard.html",
    "book/kernels.html",
    *(f"chapters/{slug}.html" for slug in CHAPTERS),
    "book/notation.html",
    "book/api.html",
    "book/api/kernels.html",
    "book/api/models.html",
    "book/references.html",
]
FORMULAS = """() => [...document.querySelectorAll(".math")].map((formula) => {
  const drawn = formula.querySelector("mjx-container");
  const box = drawn?.getBoundingClientRect();
  const visible = formula.offsetParent !== null;
  return {
    source: formula.textContent.slice(0, 80),
    ok: !visible || (drawn && box.width > 0 && box.height > 0),
    error: formula.querySelector("mjx-merror, merror")?.textContent ?? "",
  };
})"""
CUT = """() => [...document.querySelectorAll("div.math")]
  .filter((formula) => formula.scrollWidth > formula.clientWidth + 1)
  .map((formula) => formula.textContent.slice(0, 80))"""
IMAGES = """async () => Promise.all([...document.images].map(async (image) => {
  image.loading = "eager";
  await image.decode().catch(() => {});
  return { src: image.src.slice(0, 80), alt: image.alt, width: image.naturalWidth };
}))"""
VISIBLE_ROWS = ".gb-table tbody tr:not(.gb-part):not([hidden])"


class Seen(NamedTuple):
    """What a page showed, and what went wrong on the way."""

    formulas: list[dict[str, Any]]
    images: list[dict[str, Any]]
    errors: list[str]
    foreign: list[str]


class Visit:
    """A page with the console errors and failed or foreign requests that it caused."""

    def __init__(self, context: Any, site: str) -> None:
        self.site = site
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", self._response)
        self.page.route(re.compile(r"^https?://"), self._route)

    def open(self, path: str) -> Any:
        """Load a page and wait until its scripts and formulas are done."""
        self.page.goto(self.site + path, wait_until="load")
        self.page.wait_for_load_state("networkidle")
        if self.page.locator(".math").count():  # its script may come late
            self.page.wait_for_function("() => window.MathJax?.startup?.promise")
            self.page.evaluate("async () => window.MathJax.startup.promise")
        return self.page

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.errors.append(f"{response.status} {response.url}")

    def _route(self, route: Any) -> None:
        if route.request.url.startswith(self.site):
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()


@pytest.fixture
def visit(browser: Any, site: str) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield Visit(context, site)
    context.close()


@pytest.fixture(scope="session")
def seen(browser: Any, site: str) -> Callable[[str], Seen]:
    """What one visit of a page found; each page is visited once."""

    @functools.cache
    def look(path: str) -> Seen:
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        visit = Visit(context, site)
        page = visit.open(path)
        found = Seen(page.evaluate(FORMULAS), page.evaluate(IMAGES), visit.errors, visit.foreign)
        context.close()
        return found

    return look


@pytest.mark.parametrize("path", PAGES)
def test_page_loads_without_errors_or_network(seen: Callable[[str], Seen], path: str) -> None:
    assert seen(path).foreign == []
    assert seen(path).errors == []


@pytest.mark.parametrize("path", PAGES)
def test_formulas_are_drawn(seen: Callable[[str], Seen], path: str) -> None:
    formulas = seen(path).formulas
    assert [f for f in formulas if not f["ok"] or f["error"]] == []
    if path.startswith("chapters/") or path in ("book/notation.html", "book/kernels.html"):
        assert formulas


@pytest.mark.parametrize("path", PAGES)
def test_images_load_and_have_alt_text(seen: Callable[[str], Seen], path: str) -> None:
    images = seen(path).images
    assert images
    assert [image for image in images if not image["alt"] or not image["width"]] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_no_serious_accessibility_violation(
    browser: Any, site: str, path: str, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": 1400, "height": 1000}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = Visit(context, site).open(path)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    violations = Axe().run(page).response["violations"]
    context.close()
    assert [
        f"{v['id']}: {node['target']} {node['failureSummary']}"
        for v in violations
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ] == []


@pytest.mark.parametrize("path", PAGES)
def test_narrow_screen_needs_no_sideways_scrolling(browser: Any, site: str, path: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = Visit(context, site).open(path)
    width = page.evaluate("document.documentElement.scrollWidth")
    cut = page.evaluate(CUT)
    context.close()
    assert width <= 400
    assert cut == []  # a wide formula scrolls in itself


@pytest.mark.parametrize("slug", CHAPTERS)
def test_chapter_has_badge_and_download(visit: Visit, slug: str) -> None:
    page = visit.open(f"chapters/{slug}.html")
    assert page.locator("h1 + .gb-badge .gb-pill").count() >= 1
    assert page.locator(f'a[href$="_sources/chapters/{slug}.ipynb"]').count() >= 1


def test_scoreboard_filters_by_text(visit: Visit) -> None:
    page = visit.open("book/scoreboard.html")
    everything = page.locator(VISIBLE_ROWS).count()
    before = page.locator(".gb-count span").inner_text()
    page.locator("input[name=text]").fill("superconducting")
    assert page.locator(VISIBLE_ROWS).count() == 1 < everything
    assert page.locator(".gb-count span").inner_text() != before
    assert page.locator(".gb-part:not([hidden])").all_inner_texts() == ["Other substrates"]
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function(f"document.querySelectorAll('{VISIBLE_ROWS}').length === {everything}")


def test_scoreboard_filters_by_part_verdict_and_scale(visit: Visit) -> None:
    page = visit.open("book/scoreboard.html")
    page.locator("select[name=verdict]").select_option("planned")
    planned = page.locator(VISIBLE_ROWS).count()
    page.locator("select[name=part]").select_option("Doing less")
    assert 0 < page.locator(VISIBLE_ROWS).count() < planned
    page.get_by_role("button", name="Reset").click()
    page.locator("select[name=scale]").select_option("small")
    page.locator("select[name=verdict]").select_option("not run")
    rows = page.locator(VISIBLE_ROWS)
    assert {row.get_attribute("data-small") for row in rows.all()} <= {"not run"}
    assert page.locator("th[data-column=full]").is_hidden()


def test_scoreboard_filter_survives_reload(visit: Visit) -> None:
    page = visit.open("book/scoreboard.html?verdict=planned")
    assert page.locator("select[name=verdict]").input_value() == "planned"
    assert set(page.locator(VISIBLE_ROWS).evaluate_all("r => r.map(x => x.dataset.verdicts)")) == {
        "planned"
    }


def test_scoreboard_sorts_by_column_and_back(visit: Visit) -> None:
    page = visit.open("book/scoreboard.html")
    names = f"[...document.querySelectorAll('{VISIBLE_ROWS} > th')].map(c => c.dataset.sort)"
    order = page.evaluate(names)
    head = page.locator("th[data-column=paper]")
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.evaluate(names) == sorted(order) != order
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.evaluate(names) == sorted(order, reverse=True)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    assert page.evaluate(names) == order


def test_scoreboard_is_complete_without_scripts(browser: Any, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site + "book/scoreboard.html")
    papers = page.locator(".gb-table tbody th[scope=row]")
    assert len(set(papers.evaluate_all("cells => cells.map(c => c.dataset.sort)"))) == len(
        entries()
    )
    assert page.locator(".gb-filter").is_hidden()
    context.close()
