"""`gatebook new SLUG`: the files of a new chapter, filled with what is known of the paper."""

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

import yaml

from gatebook.book.papers import Paper, entries, papers

PLACEHOLDER = "FILL IN"


def create(root: Path, slug: str) -> list[str]:
    """Write the chapter's files and entries, and say what was written.

    Returns:
        One line for each file written or changed, and what to do next.

    Raises:
        ValueError: the slug is malformed, or one of the files exists already. Nothing is written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        raise ValueError(f"a slug is lower-case words joined by hyphens, got {slug!r}")
    fields = _fields(slug)
    files = {
        root / "chapters" / f"{slug}.yml": _fill("chapter.yml", fields),
        root / "chapters" / f"{slug}.ipynb": _notebook(_fill("notebook.py.txt", fields)),
        root / "lib/gatebook/models" / f"{fields['name']}.py": _fill("model.py.txt", fields),
        root / "tests/models" / f"test_{fields['name']}.py": _fill("test.py.txt", fields),
    }
    there = [path.relative_to(root).as_posix() for path in files if path.exists()]
    if there:
        raise ValueError(f"{', '.join(there)} exists already; nothing was written")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    said = [f"wrote {path.relative_to(root).as_posix()}" for path in files]
    said += [
        f"changed {name}" for name in (_add_to_toc(root, fields), _add_reference(root, fields))
    ]
    return [
        *said,
        f"next: replace every {PLACEHOLDER!r}, then `gatebook run {slug} --update` and "
        f"`gatebook verify {slug}`",
    ]


def notebook_of(slug: str) -> str:
    """The scaffolded notebook of a paper, as JSON."""
    return _notebook(_fill("notebook.py.txt", _fields(slug)))


def _fields(slug: str) -> dict[str, str]:
    known = {paper.slug: paper for paper in papers()}
    unlisted = Paper(slug=slug, title=slug, arxiv="0000.00000", part="Other")
    paper = known.get(slug, unlisted)
    name = slug.replace("-", "_")
    name += "_model" if keyword.iskeyword(name) else ""
    return {
        "slug": slug,
        "name": name,
        "Name": "".join(word.capitalize() for word in name.split("_")),
        "key": slug,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "year": f"20{paper.arxiv[:2]}",
        "part": paper.part,
        "thin": str(paper.thin).lower(),
    }


def _fill(template: str, fields: dict[str, str]) -> str:
    text = resources.files("gatebook").joinpath("templates", template).read_text(encoding="utf-8")
    return Template(text).substitute(fields)


def _notebook(script: str) -> str:
    """A notebook from cells that are separated by `# %%` lines."""
    import nbformat

    v4 = nbformat.v4
    notebook = v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    for number, part in enumerate(script.split("# %%")[1:]):
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
            cell = v4.new_markdown_cell(text)
        else:
            cell = v4.new_code_cell(body.strip())
            cell.metadata["tags"] = re.findall(r"tags=(\S+)", head)
        cell["id"] = f"cell-{number:02d}"
        notebook.cells.append(cell)
    return nbformat.writes(notebook) + "\n"


def _add_to_toc(root: Path, fields: dict[str, str]) -> str:
    """Enter the chapter in reading order: after the front matter, before the reference part."""
    path = root / "_toc.yml"
    toc = yaml.safe_load(path.read_text(encoding="utf-8"))
    first, *parts, last = toc["parts"]
    by_caption = {part["caption"]: part for part in parts}
    part = by_caption.setdefault(fields["part"], {"caption": fields["part"], "chapters": []})
    part["chapters"].append({"file": f"chapters/{fields['slug']}"})
    for part in by_caption.values():
        part["chapters"].sort(key=_place)
    middle = sorted(by_caption.values(), key=lambda part: _place(part["chapters"][0]))
    toc["parts"] = [first, *middle, last]
    path.write_text(yaml.safe_dump(toc, sort_keys=False, width=100), encoding="utf-8")
    return path.name


def _place(entry: dict[str, str]) -> int:
    """Where a chapter stands in the reading order; papers that are not listed come last."""
    order = [f"chapters/{entry.slug}" for entry in entries()]
    return order.index(entry["file"]) if entry["file"] in order else len(order)


def _add_reference(root: Path, fields: dict[str, str]) -> str:
    path = root / "book/references.bib"
    text = path.read_text(encoding="utf-8")
    if not re.search(rf"@\w+\{{{fields['key']},", text):
        text += (
            f"\n@misc{{{fields['key']},\n  title = {{{{{fields['title']}}}}},\n"
            f"  author = {{{PLACEHOLDER}}},\n  journal = {{arXiv:{fields['arxiv']}}},\n"
            f"  year = {{{fields['year']}}},\n}}\n"
        )
        path.write_text(text, encoding="utf-8")
    return "book/references.bib"
