"""The command `gatebook`: run chapters, look at evidence, add papers."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from gatebook.errors import unknown

SCALES = click.Choice(["small", "medium", "full"])


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are written below


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gatebook")
def main() -> None:
    """Gatebook replicates papers on efficient Transformers, one notebook each.

    \b
    Start here:
      gatebook list                     which chapters there are
      gatebook run gla                  run one on this machine's CPU, in under a minute
      gatebook run gla -p seed=1        the same with another seed
      gatebook run gla --scale medium   on a GPU, in about five minutes
      gatebook estimate gla             what the paper's own run would cost
      gatebook scoreboard               every claim with its verdict
    """


@main.command("list")
def list_chapters() -> None:
    """List the chapters, with the verdicts of their claims."""
    from gatebook.evidence import ledger

    root = _root()
    for slug in ledger.chapters(root):
        chapter = _guard(ledger.load_chapter, root, slug)
        rows = [row for row in _guard(ledger.rows, root, [slug]) if row["verdict"] != "not run"]
        click.echo(f"{slug:<18} {chapter.title}")
        for scale in ("small", "medium", "full"):
            found = [f"{row['claim']} {row['verdict']}" for row in rows if row["scale"] == scale]
            if found:
                click.echo(f"{'':<18} {scale}: {', '.join(found)}")


@main.command()
@click.argument("slug")
@click.option("--scale", type=SCALES, default="small", show_default=True)
@click.option("-p", "pairs", multiple=True, metavar="NAME=VALUE", help="A parameter; repeatable.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the notebook goes.")
@click.option("--record", is_flag=True, help="Write the evidence to results/SLUG/SCALE.json.")
@click.option(
    "--update", is_flag=True, help="Record, and store the outputs in chapters/ (small only)."
)
def run(
    slug: str,
    scale: str,
    pairs: tuple[str, ...],
    output: Path | None,
    record: bool,
    update: bool,
) -> None:
    """Run the chapter SLUG.

    The executed notebook goes to runs/SLUG-SCALE.ipynb. When a cell fails, the command says which
    one, keeps the notebook up to there, and exits with 1.
    """
    from gatebook import runner
    from gatebook.evidence import ledger

    root = _root()
    _guard(ledger.load_chapter, root, slug)
    if update and scale != "small":
        raise click.UsageError("--update is for --scale small; larger scales take --record")
    if update and pairs:
        raise click.UsageError("--update stores the defaults' outputs and takes no -p")
    parameters = _parameters(root, slug, pairs) | {"scale": scale}
    if record or update:
        parameters["record"] = True
    output = output or Path("runs") / f"{slug}-{scale}.ipynb"
    started = time.perf_counter()
    together = ledger.restored_on_failure(root, slug, scale) if update else nullcontext()
    with _reported(), together:
        failure = runner.execute(root, slug, parameters, output)
        if failure:
            raise click.ClickException(f"{failure}\nThe notebook up to there: {output}")
        if update:
            runner.store_outputs(root, slug, output)
    click.echo(f"{slug} at {scale}: {time.perf_counter() - started:.1f} s, {output}")


@main.command()
@click.argument("slug")
@click.option("--scale", type=SCALES, default="full", show_default=True)
@click.option("--gpus", type=click.IntRange(1), help="Number of GPUs; default the paper's.")
def estimate(slug: str, scale: str, gpus: int | None) -> None:
    """Say what running SLUG costs, without running it."""
    from gatebook.evidence import ledger
    from gatebook.notebook import price_tag

    chapter = _guard(ledger.load_chapter, _root(), slug)
    click.echo(price_tag(chapter, scale, gpus))


@main.command()
def refresh() -> None:
    """Run the chapters whose evidence at small is missing or stale, and store their outputs."""
    from gatebook.evidence import ledger

    root = _root()
    for slug in ledger.chapters(root):
        evidence = _guard(ledger.read, root, slug, "small")
        if evidence is None or evidence.stale:
            why = "missing" if evidence is None else "stale"
            click.echo(f"{slug}: evidence at small is {why}; running it")
            click.get_current_context().invoke(
                run, slug=slug, scale="small", pairs=(), output=None, record=True, update=True
            )


@main.command()
@click.argument("slugs", nargs=-1)
def verify(slugs: tuple[str, ...]) -> None:
    """Check notebooks and evidence of SLUGS (default: all chapters). Exit 1 on a fault."""
    from gatebook import gates
    from gatebook.evidence import ledger

    root = _root()
    names = list(slugs) or ledger.chapters(root)
    for slug in names:
        if slug not in ledger.chapters(root):
            raise click.UsageError(unknown("chapter", slug, ledger.chapters(root)))
    faults = gates.check_all(root, names, click.echo)
    click.echo(f"{len(names)} chapter(s) checked, {faults} fault(s)")
    sys.exit(1 if faults else 0)


@main.command()
@click.option("--tsv", is_flag=True, help="Tab-separated, one row for each claim and scale.")
def scoreboard(tsv: bool) -> None:
    """Print every claim with its verdict at each scale."""
    from gatebook.evidence import ledger

    rows = _guard(ledger.rows, _root())
    if tsv:
        click.echo(ledger.tsv(rows), nl=False)
        return
    for row in rows:
        if row["verdict"] != "not run":
            note = " (code changed since)" if row["stale"] == "yes" else ""
            click.echo(
                f"{row['chapter']:<12} {row['claim']:<4} {row['scale']:<7} {row['verdict']:<13} "
                f"{row['ours']}  paper: {row['paper']}{note}"
            )
    left = sum(row["verdict"] == "not run" for row in rows)
    click.echo(f"{len(rows)} rows, {left} of them not run (--tsv lists the reasons)")


@main.command()
@click.argument("slug")
def new(slug: str) -> None:
    """Scaffold a chapter: .yml, notebook, model, test, table of contents, reference."""
    from gatebook import scaffold

    for line in _guard(scaffold.create, _root(), slug):
        click.echo(line)


@main.command()
@click.argument("name", required=False)
@click.option("--data-dir", default="", help="Folder with local copies.")
def data(name: str | None, data_dir: str) -> None:
    """List the data sets, or check that NAME can be had and has the right columns."""
    from gatebook.data import sources

    if name is None:
        for key in sources.DATASETS:
            click.echo(sources.how_to_get(key))
        return
    if name not in sources.DATASETS:
        raise click.UsageError(unknown("data set", name, sources.DATASETS))
    for split in sources.DATASETS[name].splits:
        dataset = _guard(sources.load, name, split, data_dir)
        click.echo(f"{name} {split}: {len(dataset):,} rows, columns {dataset.column_names}")


def _root() -> Path:
    from gatebook.evidence import provenance

    return _guard(provenance.root)


def _guard(function: Any, *args: Any) -> Any:
    """Call, and turn the library's own errors into one message and exit status 1."""
    with _reported():
        return function(*args)


@contextmanager
def _reported() -> Iterator[None]:
    """Turn the library's own errors into one message and exit status 1."""
    from gatebook.data.sources import DataUnavailableError
    from gatebook.evidence.ledger import EvidenceError
    from gatebook.runner import NotebookError

    try:
        yield
    except (
        ValueError,
        FileNotFoundError,
        EvidenceError,
        DataUnavailableError,
        NotebookError,
    ) as error:
        raise click.ClickException(str(error)) from None


def _parameters(root: Path, slug: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=VALUE` pairs, checked against the notebook's parameters before anything starts."""
    from gatebook import runner

    defaults = _guard(runner.default_parameters, root, slug)
    given: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            raise click.UsageError(f"-p needs NAME=VALUE, got {pair!r}")
        if name == "scale":
            raise click.UsageError("give the scale with --scale")
        if name not in defaults:
            raise click.UsageError(unknown("parameter", name, defaults))
        try:
            given[name] = runner.convert(text, type(defaults[name]))
        except ValueError:
            kind = type(defaults[name]).__name__
            raise click.UsageError(f"parameter {name!r} must be {kind}, got {text!r}") from None
    return given


if __name__ == "__main__":
    main()
