"""Run a chapter's notebook through papermill, and store its outputs."""

import ast
import json
import os
from pathlib import Path
from typing import Any

DROPPED_METADATA = ("papermill", "execution", "widgets")


def default_parameters(root: Path, slug: str) -> dict[str, Any]:
    """Names and default values in the notebook's cell that is tagged `parameters`.

    Raises:
        ValueError: there is no such cell.
    """
    path = root / "chapters" / f"{slug}.ipynb"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            body = ast.parse("".join(cell["source"])).body
            return {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
    raise ValueError(f"{path.name} has no cell tagged `parameters`")


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
    """
    import papermill

    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    try:
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
    return None


def store_outputs(root: Path, slug: str, executed: Path) -> None:
    """Put the outputs of an executed notebook into the chapter, replaced in one step.

    Everything else of the chapter stays: sources, tags, kernel. What papermill adds is dropped.
    """
    path = root / "chapters" / f"{slug}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    ran = json.loads(executed.read_text(encoding="utf-8"))
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
    partial.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])
