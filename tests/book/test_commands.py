"""Every command that a page or the README shows exists, with the options that are shown."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from gatebook.cli import main
from gatebook.evidence import ledger

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
KNOWN = {"make", "gatebook", "papermill", "python", "source", "tail", "torchrun"}


def commands(text: str) -> list[str]:
    """The commands of a page's `bash` blocks, without comments; one may have several lines."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [command for block in blocks for command in _whole(block)]


def _whole(block: str) -> list[str]:
    found, open_lines = [], ""
    for line in block.replace("\\\n", "").splitlines():
        if not open_lines and (not line.strip() or line.startswith("#")):
            continue
        open_lines += line + "\n"
        if open_lines.count('"') % 2 == 0:
            found.append(open_lines.strip())
            open_lines = ""
    return found


def check(command: str) -> None:
    """Refuse a command that would not start.

    Raises:
        ValueError: unknown program, make target, notebook, chapter, subcommand or option.
    """
    program, *words = shlex.split(command)
    if program not in KNOWN:
        raise ValueError(f"no test knows {program!r}")
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        asked = [word for word in words if "=" not in word and word != "-s"]
        if not set(asked) <= set(targets):
            raise ValueError(f"no target {asked[0]!r}")
    if program == "papermill" and not (ROOT / words[0]).is_file():
        raise ValueError(f"no notebook {words[0]!r}")
    if program == "gatebook":
        _check_gatebook(words)
    if program == "python" and words[0] == "-c":
        _check_code(words[1])
    elif program == "python":
        _check_benchmark(*words)
    if program == "torchrun":
        _check_torchrun(words)


def _check_code(code: str) -> None:
    """What the code imports is there, and so are the attributes that it takes from it."""
    tree, names = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        owner = getattr(getattr(node, "value", None), "id", None)  # of an attribute
        if owner in names and not hasattr(names[owner], node.attr):
            raise ValueError(f"no {node.attr!r} in {owner}")


def _check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    try:
        options = get_args_parser().parse_args(words)
    except SystemExit as error:
        raise ValueError(f"no such options: {' '.join(words)}") from error
    if importlib.util.find_spec(options.training_script) is None:
        raise ValueError(f"no module {options.training_script!r}")


def _check_benchmark(script: str, *words: str) -> None:
    """The scripts in `benchmarks/` that take options have a function `parser`."""
    if not (ROOT / script).is_file():
        raise ValueError(f"no script {script!r}")
    spec = importlib.util.spec_from_file_location("shown_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        parser = module.parser()
        module.checked(parser.parse_args(words), parser)
    except SystemExit as error:
        raise ValueError(f"no such options: {' '.join(words)}") from error


def _check_gatebook(words: list[str]) -> None:
    subcommand = main.commands.get(words[0])
    if subcommand is None:
        raise ValueError(f"no subcommand {words[0]!r}")
    try:
        context = subcommand.make_context(words[0], words[1:])
    except click.ClickException as error:
        raise ValueError(error.message) from error
    slug = context.params.get("slug")
    scaffolded = "gtrxl"  # CONTRIBUTING's example; tests/test_scaffold.py runs it
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
        "make -s bench-reports",
        "python benchmarks/nowhere.py",
        "python benchmarks/kernels.py gpus",
        "python benchmarks/kernels.py gpu --cases none",
        "curl example.org",
        "python -c 'from gatebook import models; models.lode(1)'",
        "torchrun --nnodez 2 -m gatebook.training.launch job.json",
        "torchrun --nnodes 2 -m gatebook.training.nowhere job.json",
    ],
)
def test_planted_wrong_command_is_caught(command: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)\bnot?\b"):
        check(command)


def test_the_two_commands_are_shown() -> None:
    assert {"make book", "make test"} <= {line for page, line in SHOWN if page == "README.md"}
