"""Run a chapter's notebook through papermill, and store its outputs."""

import ast
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from gatebook.evidence import provenance

DROPPED_METADATA = ("papermill", "execution", "widgets")


class NotebookError(RuntimeError):
    """A notebook could not be written."""


def default_parameters(root: Path, slug: str) -> dict[str, Any]:
    """Names and default values in the notebook's cell that is tagged `parameters`.

    Raises:
        FileNotFoundError: there is no such notebook.
        ValueError: it is broken, or has no such cell.
    """
    path = root / "chapters" / f"{slug}.ipynb"
    for cell in provenance.read_notebook(path)["cells"]:
        if "parameters" in _tags(cell):
            try:
                return _assigned("".join(cell["source"]))
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"{path.name}: the parameters cell: {error}") from None
    raise ValueError(f"{path.name} has no cell tagged `parameters`")


def _assigned(source: str) -> dict[str, Any]:
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def convert(text: str, kind: type) -> Any:
    """A command-line word as a parameter's type.

    Raises:
        ValueError: the word is not of that type.
    """
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    return kind(text)


def execute(root: Path, slug: str, parameters: dict[str, Any], output: Path) -> str | None:
    """Execute a chapter with a progress bar; the notebook so far is on disk after every cell.

    Returns:
        None, or what went wrong and in which cell.

    Raises:
        KeyboardInterrupt: passed on after the partial notebook was kept.
        NotebookError: the output could not be written.
    """
    import papermill

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            str(root / "chapters" / f"{slug}.ipynb"),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(root),
            progress_bar=True,
            log_output=False,
        )
    except papermill.PapermillExecutionError as error:
        number = error.exec_count - bool(parameters)  # papermill puts a cell of its own before it
        return f"{slug}: code cell {number} failed with {error.ename}: {error.evalue}"
    except OSError as error:
        where = error.filename or output
        raise NotebookError(f"{slug}: could not write {where}: {error.strerror}") from error
    return None


def store_outputs(root: Path, slug: str, executed: Path) -> None:
    """Put the outputs of an executed notebook into the chapter, replaced in one step.

    Everything else of the chapter stays: sources, tags, kernel. What papermill adds is dropped.

    Raises:
        NotebookError: the chapter could not be written; the old one is untouched.
    """
    path = root / "chapters" / f"{slug}.ipynb"
    notebook = provenance.read_notebook(path)
    ran = provenance.read_notebook(executed)
    done = [cell for cell in ran["cells"] if "injected-parameters" not in _tags(cell)]
    count = 0
    for cell, new in zip(notebook["cells"], done, strict=True):
        if cell["cell_type"] != "code":
            continue
        count += 1
        cell["execution_count"] = count
        cell["outputs"] = new["outputs"]
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count
        for name in DROPPED_METADATA:
            cell["metadata"].pop(name, None)
    partial = path.with_suffix(".partial")
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise NotebookError(
            f"could not write chapters/{path.name}: {error.strerror}; the old outputs are untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])
