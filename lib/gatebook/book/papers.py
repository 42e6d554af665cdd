"""The papers of the book and its comparisons across them, in reading order, written or not yet."""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper of the book.

    Attributes:
        slug: Name of its chapter: ``chapters/SLUG.ipynb`` and ``chapters/SLUG.yml``.
        title: Title of the paper.
        arxiv: arXiv identifier, without version; empty for a comparison of the book's own.
        part: The book's part that it belongs to.
        thin: True if the paper's body could not be read.
    """

    slug: str
    title: str
    part: str
    arxiv: str = ""
    thin: bool = False


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, in reading order, from ``papers.yml`` beside this module."""
    return tuple(entry for entry in entries() if entry.arxiv)


@cache
def entries() -> tuple[Paper, ...]:
    """The papers and the comparisons."""
    text = resources.files(__package__).joinpath("papers.yml").read_text("utf-8")
    return tuple(
        Paper(part=part["part"], **paper)
        for part in yaml.safe_load(text)
        for paper in part["papers"]
    )
