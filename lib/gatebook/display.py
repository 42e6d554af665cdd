"""Progress bars and HTML, in a notebook and in a terminal."""

import html
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def progress(items: Iterable[Any], what: str | Callable[[], str] = "") -> Iterator[Any]:
    """Iterate with a progress bar that disappears when it is done.

    In a notebook the bar is one display that is rewritten; elsewhere it is tqdm's on stderr, where
    that is a terminal.

    Args:
        items: What to iterate over.
        what: Words beside the bar, or a function that gives them anew at each item.
    """
    if in_notebook():
        yield from _notebook_bar(items, what)
        return
    from tqdm import tqdm

    yield from _described(tqdm(items, leave=False, disable=not sys.stderr.isatty()), what)


def _described(bar: Any, what: str | Callable[[], str]) -> Iterator[Any]:
    """The items of a bar, whose words are brought up to date before each."""
    for item in bar:
        bar.set_description(what() if callable(what) else what, refresh=False)
        yield item


def _notebook_bar(items: Iterable[Any], what: str | Callable[[], str]) -> Iterator[Any]:
    """One HTML display that is rewritten at most five times a second and emptied at the end."""
    from IPython.display import HTML, display
    from tqdm import tqdm

    handle = display(HTML(""), display_id=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        bar = tqdm(items, file=nowhere, ascii=False, ncols=100)
        shown = 0.0
        try:
            for item in _described(bar, what):
                yield item
                if time.monotonic() - shown > 0.2:
                    shown = time.monotonic()
                    handle.update(HTML(f"<code>{html.escape(str(bar))}</code>"))
        finally:
            handle.update(HTML(""))


def show_html(text: str) -> None:
    """Show HTML in a notebook; nothing elsewhere."""
    if not in_notebook():
        return
    from IPython.display import HTML, display

    display(HTML(text))
