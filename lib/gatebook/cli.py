"""The command `gatebook`: run chapters, look at evidence, add papers."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up
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
@click.option("--arm", help="One of the chapter's models; default all.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpu", default="", help="Price another GPU than the one here, such as A100.")
@click.option("--batch", type=click.IntRange(1), help="Most samples at once on a GPU.")
def estimate(
    slug: str, scale: str, arm: str | None, gpus: int, gpu: str, batch: int | None
) -> None:
    """Say what running SLUG costs, without running it.

    Where a GPU is there, some steps are timed on it.
    """
    from gatebook.evidence import ledger
    from gatebook.notebook import price_tag
    from gatebook.training import estimate as prices
    from gatebook.training.jobs import Job

    chapter = _guard(ledger.load_chapter, _root(), slug)
    click.echo(price_tag(chapter, scale, gpus))

    def job(name: str) -> Job:
        return Job(chapter=slug, arm=name, scale=scale, batch=batch or 0)

    arms = [arm] if arm else None
    with _reported():
        for price in prices.of_chapter(
            chapter, job=job, gpus=gpus, gpu=gpu, scale=scale, arms=arms
        ):
            click.echo("\n".join(price.lines()))


@main.command("prices")
@click.option("--all", "everything", is_flag=True, help="Those that are up to date as well.")
def count_prices(everything: bool) -> None:
    """Count what full runs cost, for the page book/scaling, where code or plans have changed."""
    from gatebook.book import prices
    from gatebook.evidence import ledger

    root = _root()
    for slug in ledger.chapters(root) if everything else prices.stale(root):
        click.echo(f"{slug} …")
        with _reported():
            prices.update(root, [slug])
    click.echo("every price is up to date")


def _job_options(command: Any) -> Any:
    """The options that say what is trained, and how."""
    options = (
        click.option("--arm", help="One of the chapter's models."),
        click.option("--scale", type=SCALES, default="full", show_default=True),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--steps", type=click.IntRange(1), help="Default: the whole recipe."),
        click.option("--batch", type=click.IntRange(1), help="Most samples at once on a GPU."),
        click.option("--data-dir", envvar="GATEBOOK_DATA", help="Folder with local copies."),
        click.option("--folder", help="Of the run; default runs/SLUG/SCALE/ARM-SEED."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
        click.option("--strategy", type=click.Choice(["ddp", "fsdp"]), default="ddp"),
        click.option("--compile", is_flag=True, help="Compile the model's blocks."),
        click.option("--recompute", is_flag=True, help="Save memory: compute activations twice."),
        click.option("--tensorboard", is_flag=True, help="Write TensorBoard events too."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("slug")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True)
@_job_options
def train(slug: str, gpus: int, **options: Any) -> None:
    """Train one arm of the chapter SLUG on this machine.

    \b
      gatebook train gla --arm vector --gpus 8 --data-dir DATA

    Ctrl-C writes a checkpoint and ends. The same command goes on from there.
    """
    jobs = _jobs(slug, gpus, options)
    if options["arm"] is None:
        raise click.UsageError(f"train needs --arm: {', '.join(job.arm for job in jobs)}")
    from gatebook.display import progress
    from gatebook.training import CheckpointError, launch

    _show_price(jobs[0], gpus)
    folder = jobs[0].path(_root())
    click.echo(f"{slug} {jobs[0].arm}: log, checkpoints and weights go to {folder}")
    try:
        with _reported():
            history = launch.launch(jobs[0], gpus=gpus, progress=progress)
    except (CheckpointError, FloatingPointError, ImportError, launch.WorkerError) as error:
        raise click.ClickException(str(error)) from None
    how = "stopped; the same command goes on" if history.stopped else "done"
    click.echo(f"{len(history.loss)} steps in {history.seconds:.0f} s, {how}")


@main.command()
@click.argument("slug")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="On each node.")
@click.option("--cpus", type=click.IntRange(1), default=8, show_default=True, help="For each GPU.")
@click.option("--partition", help="Of Slurm; default the cluster's own.")
@click.option("--hours", type=click.FloatRange(1 / 60), default=24.0, show_default=True)
@click.option("--local", is_flag=True, help="In the background on this machine, without Slurm.")
@_job_options
def submit(
    slug: str,
    nodes: int,
    gpus: int,
    cpus: int,
    partition: str | None,
    hours: float,
    local: bool,
    **options: Any,
) -> None:
    """Submit the arms of the chapter SLUG to Slurm, a job for each, or one ARM.

    \b
      gatebook submit gla --nodes 2 --gpus 8 --data-dir DATA

    Before its time is up a job writes a checkpoint and queues itself again.
    """
    jobs = _jobs(slug, nodes * gpus, options)
    if len(jobs) > 1 and (local or options["folder"]):
        raise click.UsageError("--local and --folder need --arm: they are for one run")
    try:
        from gatebook.training import cluster
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: pip install 'gatebook[cluster]'") from None
    where = "local" if local else "slurm"
    size = {"nodes": nodes, "gpus": gpus, "cpus": cpus, "minutes": round(60 * hours)}
    for job in jobs:
        _show_price(job, nodes * gpus)
        try:
            with _reported():
                submitted = cluster.submit(job, cluster=where, partition=partition, **size)
        except RuntimeError as error:  # submitit's: no Slurm, or sbatch refuses
            raise click.ClickException(str(error)) from None
        click.echo(f"{slug} {job.arm}: job {submitted.job_id}")
        click.echo(f"  {cluster.how_to_follow(submitted)}")


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
    from gatebook.data.images import sources  # with those of pictures

    if name is None:
        for key in sources.DATASETS:
            click.echo(sources.how_to_get(key))
        return
    if name not in sources.DATASETS:
        raise click.UsageError(unknown("data set", name, sources.DATASETS))
    for split in sources.DATASETS[name].splits:
        dataset = _guard(sources.load, name, split, data_dir)
        click.echo(f"{name} {split}: {len(dataset):,} rows, columns {dataset.column_names}")


def _jobs(slug: str, processes: int, options: dict[str, Any]) -> list[Any]:
    """The job of the arm in the options, or those of all arms."""
    from gatebook.evidence import ledger
    from gatebook.training.jobs import Job, build

    settings = _guard(ledger.load_chapter, _root(), slug).scales[options["scale"]].settings
    given = {name: value for name, value in options.items() if value is not None}
    given["max_steps"] = given.pop("steps", 0)
    arms = [given.pop("arm")] if "arm" in given else settings.get("arms", [""])
    jobs = [Job(chapter=slug, arm=arm, **given) for arm in arms]
    with _reported():
        for job in jobs:
            build(job, processes=processes)
    return jobs


def _show_price(job: Any, gpus: int) -> None:
    """Print what a job costs; nothing is timed, so that it starts at once."""
    from gatebook.training.estimate import estimate

    click.echo("\n".join(_guard(partial(estimate, job, gpus=gpus, probe=False)).lines()))


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
