"""No dead link and no missing anchor inside the built book."""

from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ADDRESS = {"a": "href", "link": "href", "img": "src", "script": "src", "audio": "src"}


class _Page(HTMLParser):
    """The anchors that a page offers and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        address = found.get(ADDRESS.get(tag, ""))
        if address:
            self.addresses.append(address)


def dead_links(root: Path) -> dict[str, list[str]]:
    """Addresses inside a site that lead nowhere, by page.

    Args:
        root: Folder of the built site.

    Returns:
        For each page with dead links (its path within the site), the addresses as written.
    """
    pages = {
        path: _Page(path.read_text("utf-8"))
        for path in root.rglob("*.html")
        if "_static" not in path.relative_to(root).parts
    }
    dead = defaultdict(list)
    for path, page in pages.items():
        for address in page.addresses:
            if not all(_reached(root, path, address, pages)):
                dead[path.relative_to(root).as_posix()].append(address)
    return dict(dead)


def _reached(root: Path, origin: Path, address: str, pages: dict[Path, _Page]) -> Iterator[bool]:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return
    target = origin
    if parts.path:
        start = root if parts.path.startswith("/") else origin.parent
        target = (start / unquote(parts.path).lstrip("/")).resolve()
        yield target.is_file() and target.is_relative_to(root.resolve())
    if parts.fragment and target in pages:
        yield unquote(parts.fragment) in pages[target].anchors | {"top"}


def test_no_dead_link_in_the_book(html: Path) -> None:
    assert dead_links(html.resolve()) == {}


def test_planted_dead_links_are_caught(tmp_path: Path) -> None:
    site = tmp_path.resolve()
    (site / "chapters").mkdir()
    (site / "good.html").write_text('<h1 id="here">x</h1><a href="chapters/one.html#there">y</a>')
    (site / "chapters/one.html").write_text(
        '<p id="there"></p><a href="../good.html#here">a</a><a href="#top">b</a>'
        '<a href="https://arxiv.org/abs/2312.06635">c</a>'
        '<a href="gone.html">d</a><a href="../good.html#gone">e</a><img src="gone.png">'
        '<a href="../../outside.html">f</a><a href="#nowhere">g</a>'
    )
    assert dead_links(site) == {
        "chapters/one.html": [
            "gone.html",
            "../good.html#gone",
            "gone.png",
            "../../outside.html",
            "#nowhere",
        ]
    }
