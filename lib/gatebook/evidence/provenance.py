"""Where a number came from: commit, versions, hardware, command, and a hash of the code."""

import ast
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Modules that run chapters and turn numbers into verdicts, tables and pictures. A verdict is
# computed again from the recorded numbers whenever it is read, so that editing these is not
# expected to make recorded numbers wrong.
PRESENTATION = (
    "gatebook.book",
    "gatebook.cli",
    "gatebook.display",
    "gatebook.errors",
    "gatebook.evidence",
    "gatebook.gates",
    "gatebook.backbones.report",
    "gatebook.mixers.report",
    "gatebook.notebook",
    "gatebook.plotting",
    "gatebook.runner",
    "gatebook.scaffold",
)
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "scipy", "accelerate", "datasets", "torchmetrics", "triton")


def root() -> Path:
    """The folder that holds `chapters/` and `results/`: the checkout, or the working folder.

    Raises:
        FileNotFoundError: neither has a folder `chapters`.
    """
    for folder in (Path.cwd(), Path.cwd().parent, PACKAGE_ROOT.parent):
        if (folder / "chapters").is_dir():
            return folder
    raise FileNotFoundError("no folder `chapters` here: run this inside a checkout of Gatebook")


def chapter_hash(root: Path, slug: str, scale: str | None = None) -> str:
    """Hash of a chapter's code cells, its scale and tests, and every module that it imports.

    Imports are followed through the source, those inside functions too. Outputs, prose,
    comments, docstrings and blank lines do not count, nor do the `PRESENTATION` modules.

    Args:
        root: of the checkout.
        slug: of the chapter.
        scale: whose settings and tests count; None takes those of all scales.
    """
    cells = code_cells(root / "chapters" / f"{slug}.ipynb")
    digest = hashlib.sha256()
    digest.update(_essence("\n".join(cells)).encode())
    digest.update(_decisive(root / "chapters" / f"{slug}.yml", scale).encode())
    for name, path in sorted(imported_modules("\n".join(cells)).items()):
        digest.update(name.encode() + essence_of_file(path).encode())
    return digest.hexdigest()[:16]


def _decisive(path: Path, scale: str | None) -> str:
    """The parts of a chapter's `.yml` that numbers and verdicts depend on: scales and tests."""
    import yaml  # a benchmark runs without it

    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    leave = ("rationale", "unit") if scale is None else ("rationale", "unit", "scales")
    tests = [
        {key: value for key, value in test.items() if key not in leave}
        for claim in data["claims"]
        for test in claim.get("tests", [])
        if scale in (None, *test["scales"])
    ]
    scales = {
        name: [plan["dataset"], plan["seeds"], plan["settings"]]
        for name, plan in data["scales"].items()
        if scale in (None, name)
    }
    return json.dumps([scales, tests], sort_keys=True)


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook as stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no notebook; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: there is no such notebook in {path.parent.name}/")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if notebook["nbformat"] != 4:
            raise ValueError(f"nbformat is {notebook['nbformat']}, not 4")
        for cell in notebook["cells"]:
            "".join(cell["source"]), cell["cell_type"], cell["metadata"].get("tags", [])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path.name}: not readable as a notebook: {problem}") from None
    return notebook


def code_cells(notebook: Path) -> list[str]:
    """Sources of a notebook's code cells, without papermill's injected parameters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no notebook, or a cell is not Python; the message names it.
    """
    sources = [
        "".join(cell["source"])
        for cell in read_notebook(notebook)["cells"]
        if cell["cell_type"] == "code"
        and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    for number, source in enumerate(sources, 1):
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise ValueError(f"{notebook.name}: code cell {number}: {error}") from None
    return sources


def imported_modules(source: str) -> dict[str, Path]:
    """The `gatebook` modules that a source imports, directly or not, with their files."""
    found: dict[str, Path] = {}
    waiting = list(_imports(source, ""))
    while waiting:
        name = waiting.pop()
        path = _module_file(name)
        if path is None or name in found or name.startswith(PRESENTATION):
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _imports(path.read_text(encoding="utf-8"), package)
    return found


def _imports(source: str, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{anchor}.{base}" if base else anchor
            for name in [base, *(f"{base}.{alias.name}" for alias in node.names)]:
                yield from _parents(name)


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    if parts[0] == "gatebook":
        for end in range(1, len(parts) + 1):
            yield ".".join(parts[:end])


def _module_file(name: str) -> Path | None:
    path = PACKAGE_ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def essence_of_file(path: Path) -> str:
    """A module's source without comments, docstrings and blank lines."""
    return _essence_of_file(path, path.stat().st_mtime_ns)


@cache
def _essence_of_file(path: Path, _modified: int) -> str:
    return _essence(path.read_text(encoding="utf-8"))


def _essence(source: str) -> str:
    """Source without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            for row in range(first.lineno - 1, first.end_lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def git_commit(root: Path) -> str:
    """Short commit of the checkout, with `+changes` when files differ from it."""
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changed = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "lib", "chapters"
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GATEBOOK_COMMIT", "unknown")
    return head + ("+changes" if changed else "")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Name of the device that ran, cores and threads."""
    info: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "device": device}
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        info["threads"] = torch.get_num_threads()
        if device.startswith("cuda"):
            info["gpu"] = torch.cuda.get_device_name()
            info["cuda"] = torch.version.cuda
    return info


def hardware_line(info: dict[str, Any]) -> str:
    """The hardware in a few words: the GPU's name, or the CPU's with its threads."""
    if info.get("gpu"):
        return str(info["gpu"])
    return f"{info['cpu']}, {info.get('threads', 1)} thread(s)"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def seconds_since_start() -> float:
    """Wall time since this process began, imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def peak_memory_mb(device: str) -> dict[str, float]:
    """Largest resident memory of this process, and largest allocated GPU memory, in MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.startswith("cuda") and "torch" in sys.modules:
        peak["gpu"] = round(sys.modules["torch"].cuda.max_memory_allocated() / 1e6, 1)
    return peak
