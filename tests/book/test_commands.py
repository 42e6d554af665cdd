"""Every command that a page or the README shows exists, with the options that are shown."""

import re
import shlex
from pathlib import Path

import click
import pytest

from gatebook.cli import main
from gatebook.evidence import ledger

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
KNOWN = {"make", "gatebook", "papermill", "source"}


def commands(text: str) -> list[str]:
    """The lines of a page's `bash` blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def check(command: str) -> None:
    """Refuse a command that would not start.

    Raises:
        ValueError: unknown program, make target, notebook, chapter, subcommand or option.
    """
    program, *words = shlex.split(command)
    if program not in KNOWN:
        raise ValueError(f"no test knows {program!r}")
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        if words[0] not in targets:
            raise ValueError(f"no target {words[0]!r}")
    if program == "papermill" and not (ROOT / words[0]).is_file():
        raise ValueError(f"no notebook {words[0]!r}")
    if program == "gatebook":
        _check_gatebook(words)


def _check_gatebook(words: list[str]) -> None:
    subcommand = main.commands.get(words[0])
    if subcommand is None:
        raise ValueError(f"no subcommand {words[0]!r}")
    try:
        context = subcommand.make_context(words[0], words[1:])
    except click.ClickException as error:
        raise ValueError(error.message) from error
    slug = context.params.get("slug")
    scaffolded = "svt"  # CONTRIBUTING's example; tests/test_scaffold.py runs it
    if slug and slug not in {*ledger.chapters(ROOT), scaffolded}:
        raise ValueError(f"no chapter {slug!r}")


SHOWN = [(path.name, line) for path in PAGES for line in commands(path.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_shown_command_exists(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "gatebook frobnicate",
        "gatebook run gla --scale tiny",
        "gatebook run gla --frobnicate",
        "gatebook run nowhere",
        "papermill chapters/nowhere.ipynb out.ipynb",
        "curl example.org",
    ],
)
def test_planted_wrong_command_is_caught(command: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)\bnot?\b"):
        check(command)


def test_the_two_commands_are_shown() -> None:
    assert {"make book", "make test"} <= {line for page, line in SHOWN if page == "README.md"}
