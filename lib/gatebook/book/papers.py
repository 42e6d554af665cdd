"""The papers of the book, in reading order, whether or not their chapter is written yet."""

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
        arxiv: arXiv identifier, without version.
        part: The book's part that it belongs to.
        thin: True if the paper's body could not be read.
    """

    slug: str
    title: str
    arxiv: str
    part: str
    thin: bool = False


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, in reading order.

    Returns:
        The papers listed in ``papers.yml``, which lies beside this module.
    """
    text = resources.files(__package__).joinpath("papers.yml").read_text("utf-8")
    return tuple(
        Paper(part=part["part"], **paper)
        for part in yaml.safe_load(text)
        for paper in part["papers"]
    )
