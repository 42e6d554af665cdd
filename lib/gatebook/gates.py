"""What must be true of every chapter: checks on notebooks and evidence, each a list of faults.

`gatebook verify` runs all of them; the tests plant each fault and see it caught.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gatebook.evidence import ledger, provenance
from gatebook.evidence.verdicts import VERDICTS
from gatebook.notebook import PARAMETERS
from gatebook.scaffold import PLACEHOLDER

SMALL_SECONDS = 60
SMALL_MEMORY_MB = 4096
CELL_LINES = 32
SHOWING = ("plotting.show", "run.claims", "run.verdicts", "print")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|Users|tmp|work|opt|usr|var|mnt|data|content|private|workspace)"
    r"/[\w.@+-][\w./@+-]*|[A-Za-z]:\\\\[\w.\\\\-]+"
)
IMAGE = re.compile(r"data:[a-z]+/[a-z0-9+.-]+;base64,[A-Za-z0-9+/=\\n]+")
WORDS = [verdict for verdict in VERDICTS if verdict != "not run"]
VERDICT = rf"(?<![a-z])(?:{'|'.join(WORDS)})(?![a-z])"
ABOUT_CLAIMS = re.compile(r"\bC\d{1,2}\b|\b(?:claim|rule|verdict)s?\b", re.IGNORECASE)
MARKED_VERDICT = re.compile(  # in bold, italics, code, quotation marks, HTML tags, a table's cell
    rf"[*_`\"'“”„‘’«»]{VERDICT}|{VERDICT}[*_`\"”“’»]|(?:<[a-z][^>]*>|\|)\s*{VERDICT}"
    rf"|{VERDICT}\s*(?:</|\|)",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bcf\.)[*_`\"”)]*\s+(?=[*_`\"“(<\[]*[A-Z])"
)
BLOCK_START = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.|#+|\||>)\s)")


def check_notebook(path: Path, claims: set[str], extra: set[str] | None = None) -> list[str]:
    """Faults of a chapter's notebook.

    Args:
        path: the `.ipynb`.
        claims: claim ids that its `.yml` has.
        extra: the chapter's own parameters, besides the shared ones.
    """
    try:
        cells = provenance.read_notebook(path)["cells"]
    except ValueError as error:
        return [str(error)]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"])]
    faults = [
        *_check_outputs(code),
        *_check_parameters(code, extra or set()),
        *_check_length(code),
        *_check_prose(cells, claims),
    ]
    return [f"{path.name}: {fault}" for fault in faults]


def check_evidence(root: Path, slug: str) -> list[str]:
    """Faults of a chapter's recorded evidence: damaged, missing or stale at small, over budget."""
    faults = []
    for scale in ("small", "medium", "full"):
        try:
            evidence = ledger.read(root, slug, scale)
        except ledger.EvidenceError as error:
            faults.append(str(error))
            continue
        if scale != "small":
            continue
        if evidence is None:
            faults.append(f"{slug}: no evidence at small; run `gatebook run {slug} --update`")
            continue
        faults += _check_budget(slug, evidence.data)
        if evidence.stale:
            faults.append(
                f"{slug}: evidence at small is stale: the chapter or a module that it imports "
                f"changed since; run `gatebook run {slug} --update`"
            )
    return faults


def check_chapter(root: Path, slug: str) -> list[str]:
    """All faults of one chapter."""
    notebook = root / "chapters" / f"{slug}.ipynb"
    try:
        chapter = ledger.load_chapter(root, slug)
    except ValueError as error:
        return [str(error)]
    if not notebook.is_file():
        return [f"{slug}: chapters/{slug}.yml has no notebook beside it"]
    try:
        source = "\n".join(provenance.code_cells(notebook))
    except ValueError as error:
        return [str(error)]
    both = notebook.read_text(encoding="utf-8") + notebook.with_suffix(".yml").read_text("utf-8")
    faults = check_notebook(notebook, {claim.id for claim in chapter.claims}, _own(source))
    if PLACEHOLDER in both:
        faults.append(f"{slug}: {both.count(PLACEHOLDER)} times {PLACEHOLDER!r} left to replace")
    if not any(name.startswith("gatebook.models.") for name in provenance.imported_modules(source)):
        faults.append(f"{slug}: the notebook imports no module of gatebook.models by its name")
    return faults + check_evidence(root, slug)


def _own(source: str) -> set[str]:
    """Names in `start(..., extra={...})`."""
    match = re.search(r"start\([^\n]*?extra\s*=\s*(?:dict\(([^)]*)\)|\{([^}]*)\})", source)
    if not match:
        return set()
    return set(re.findall(r"[\"']?(\w+)[\"']?\s*[:=]", match[1] or match[2]))


def _check_outputs(code: list[dict[str, Any]]) -> Iterator[str]:
    for number, cell in enumerate(code, 1):
        if cell.get("execution_count") is None:
            yield f"code cell {number} has no execution count: outputs were stripped"
        elif not cell.get("outputs") and (call := _call_that_shows("".join(cell["source"]))):
            yield f"code cell {number} calls {call}, but stores no output"
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                yield f"code cell {number} stores an error: {output.get('ename')}"
            if output.get("name") == "stderr":
                yield f"code cell {number} stores stderr noise"
            text = IMAGE.sub("", json.dumps(output))
            for found in sorted(set(ABSOLUTE_PATH.findall(text))):
                yield f"code cell {number} stores an absolute path: {found}"


def _call_that_shows(source: str) -> str | None:
    """The first call in `SHOWING` that runs whenever the cell does: a statement of its own."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic
        return None
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func)
            if name in SHOWING:
                return name
    return None


def _check_parameters(code: list[dict[str, Any]], extra: set[str]) -> Iterator[str]:
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged `parameters`; there must be one"
        return
    lines = [line for line in "".join(tagged[0]["source"]).splitlines() if "=" in line]
    names = {line.split("=")[0].strip() for line in lines}
    wanted = set(PARAMETERS) | extra
    if names != wanted:
        yield f"the parameters cell sets {sorted(names)}; it must set {sorted(wanted)}"
    for line in lines:
        if "#" not in line or line.count("=") > 1:
            yield f"parameter line needs one `=` and a comment: {line}"


def _check_length(code: list[dict[str, Any]]) -> Iterator[str]:
    for number, cell in enumerate(code, 1):
        lines = len("".join(cell["source"]).splitlines())
        if lines > CELL_LINES:
            yield f"code cell {number} has {lines} lines; the limit is {CELL_LINES}"


def _check_prose(cells: list[dict[str, Any]], claims: set[str]) -> Iterator[str]:
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for claim in sorted(set(re.findall(r"\bC\d+\b(?!\s*[=×x])", text)) - claims):
                yield f"prose names the claim {claim}, which the .yml does not have"
            for sentence in filter(_gives_a_verdict, _sentences(text)):
                yield f"a verdict typed by hand: {sentence!r}; verdicts are computed"
        elif cell["cell_type"] == "code":
            for match in re.finditer(rf"[\"'](?:{'|'.join(WORDS)})[\"']", text):
                yield f"a verdict typed by hand in code: {match[0]}; verdicts are computed"


def _sentences(text: str) -> Iterator[str]:
    """Sentences of a markdown cell, with wrapped lines joined."""
    for block in BLOCK_START.split(text):
        yield from SENTENCE_END.split(" ".join(block.split()))


def _gives_a_verdict(sentence: str) -> bool:
    """Whether a verdict word stands beside a claim, or is set off as a verdict is."""
    if MARKED_VERDICT.search(sentence):
        return True
    plain = re.sub(r"<[^>]*>|[*_`]", " ", sentence)
    return bool(re.search(VERDICT, plain, re.IGNORECASE) and ABOUT_CLAIMS.search(plain))


def _check_budget(slug: str, data: dict[str, Any]) -> Iterator[str]:
    if data["wall_seconds"] > SMALL_SECONDS:
        yield f"{slug}: small took {data['wall_seconds']} s; the limit is {SMALL_SECONDS} s"
    if data["peak_memory_mb"]["host"] > SMALL_MEMORY_MB:
        yield (
            f"{slug}: small took {data['peak_memory_mb']['host']} MB; "
            f"the limit is {SMALL_MEMORY_MB} MB"
        )


def check_all(root: Path, slugs: list[str], tell: Callable[[str], None] = print) -> int:
    """Check chapters, tell every fault, and return how many there are."""
    faults = [fault for slug in slugs for fault in check_chapter(root, slug)]
    for fault in faults:
        tell(fault)
    return len(faults)
