"""What a chapter's notebook calls: `start` checks the parameters and gives a `Run`.

A `Run` hands out settings, seeds and progress bars, collects observations, and at the end turns
them into verdicts by the rules in the chapter's `.yml`.
"""

import ast
import inspect
import os
import random
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gatebook import display
from gatebook.errors import unknown

PARAMETERS: dict[str, type] = {
    "scale": str,
    "seed": int,
    "device": str,
    "max_steps": int,
    "data_dir": str,
    "gpus": int,
    "strategy": str,
    "confirm": bool,
    "record": bool,
}
DEVICES = ("auto", "cpu", "cuda", "mps")
CONFIRM_FROM = 10.0  # GPU-hours from which on a full run has to be confirmed


class Run:
    """One execution of a chapter. Made by `start`."""

    def __init__(self, root: Path, chapter: Any, parameters: dict[str, Any]) -> None:
        self.root, self.chapter, self.parameters = root, chapter, parameters
        self.scale: str = parameters["scale"]
        self.seed: int = parameters["seed"]
        self.max_steps: int = parameters["max_steps"]
        self.data_dir: str = parameters["data_dir"]
        self.gpus: int = parameters["gpus"]
        self.strategy: str = parameters["strategy"]
        self.record: bool = parameters["record"]
        self.plan = chapter.scales[self.scale]
        self.settings = types.SimpleNamespace(**self.plan.settings)
        self.seeds = [self.plan.seeds * self.seed + i for i in range(self.plan.seeds)]
        self.device = _pick_device(parameters["device"])
        self.observations: dict[str, dict[str, dict[str, float]]] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        _seed_everything(self.seed)

    def steps(self, planned: int) -> int:
        """`planned`, or the parameter `max_steps` when that is set and smaller."""
        return min(planned, self.max_steps) if self.max_steps else planned

    def progress(self, items: Iterable[Any], what: str | Callable[[], str] = "") -> Iterator[Any]:
        """Iterate with a progress bar; see `gatebook.display.progress`."""
        return display.progress(items, what)

    def train(self, arm: str, seed: int, **settings: Any) -> tuple[Any, Any]:
        """Train one arm as a job of its own, on `gpus` processes; it can be stopped and resumed.

        Checkpoints, log and weights go to `runs/SLUG/SCALE/ARM-SEED`, as with `gatebook train`.

        Args:
            arm: a key of the scale's arms.
            seed: training seed.
            settings: instead of the scale's own.

        Returns:
            The trained model on the run's device, and its `History`, whose losses are those in the
            log: means over ten steps each, from the first on even if the run was resumed.

        Raises:
            ValueError: this chapter has no such job at this scale.
        """
        from gatebook import models
        from gatebook.training import History, launch
        from gatebook.training.metrics import logged_losses

        job = self.job(arm, seed, **settings)
        found = launch.launch(job, gpus=self.gpus, progress=self.progress)
        folder = job.path(self.root)
        if found.stopped:
            raise KeyboardInterrupt(f"{arm} was stopped; run the cell again to go on")
        losses = logged_losses(folder / "log.jsonl")
        model = models.load(folder / "weights").to(self.device)
        return model, History(loss=losses, seconds=found.seconds)

    def job(self, arm: str, seed: int = 0, **settings: Any) -> Any:
        """The training run of one arm, as `gatebook.training.jobs` knows it."""
        from gatebook.training.jobs import Job

        return Job(
            chapter=self.chapter.slug,
            arm=arm,
            scale=self.scale,
            seed=seed,
            max_steps=self.max_steps,
            data_dir=self.data_dir,
            device=self.device,
            strategy=self.strategy,
            settings=settings,
        )

    def observe(self, metric: str, arm: str, value: float, seed: int | str | None = None) -> None:
        """Record a number for the tests of this chapter.

        Args:
            metric: a metric that some test in the `.yml` uses.
            arm: one of that metric's compared arms.
            value: the number, in the test's unit.
            seed: training seed; omit it for a number that has none (a count, an identity).

        Raises:
            ValueError: no test of this chapter uses this metric and arm.
        """
        arms = {test.metric: set() for test in self.chapter.tests()}
        for test in self.chapter.tests():
            arms[test.metric].update(test.arms)
        if metric not in arms:
            raise ValueError(unknown(f"metric of {self.chapter.slug}.yml", metric, arms))
        if arm not in arms[metric]:
            raise ValueError(unknown(f"arm of {metric} in the .yml", arm, arms[metric]))
        self.observations.setdefault(metric, {}).setdefault(arm, {})[
            "-" if seed is None else str(seed)
        ] = float(value)

    def keep(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep a table with the evidence, for figures of numbers that no test uses.

        Args:
            name: of the table.
            rows: numbers and words by column.
        """
        self.tables[name] = rows

    def kept(self, scale: str, name: str) -> list[dict[str, Any]]:
        """A table of this run or, for another scale, of the recorded one; empty if there is none.

        Raises:
            EvidenceError: the recorded evidence is damaged.
        """
        from gatebook.evidence import ledger

        if scale == self.scale:
            return self.tables.get(name, [])
        evidence = ledger.read(self.root, self.chapter.slug, scale)
        return evidence.data.get("tables", {}).get(name, []) if evidence else []

    def outcomes(self) -> dict[str, list[Any]]:
        """Claim id → outcomes of its tests at this scale, by the declared rules."""
        from gatebook.evidence import verdicts

        return {
            claim.id: verdicts.claim_outcomes(claim, self.scale, self.observations)
            for claim in self.chapter.claims
        }

    def claims(self) -> None:
        """Show the table of claims; with `record`, write the evidence to `results/`.

        Other scales are shown as recorded. Call it once, after the last observation.
        """
        from gatebook.evidence import claims_table, ledger

        try:
            # first, in case the evidence cannot be written
            display.show_html(claims_table.of_run(self))
        finally:  # even if another scale's evidence cannot be read
            if self.record:
                path = ledger.write(self.root, self._evidence())
                print(f"recorded in {path.relative_to(self.root).as_posix()}")

    def verdicts(self) -> None:
        """Print one line a claim: its verdict at this scale."""
        from gatebook.evidence import verdicts

        for claim_id, found in self.outcomes().items():
            print(f"{claim_id}: {verdicts.combine(found)} at {self.scale}")

    def _evidence(self) -> dict[str, Any]:
        from gatebook.evidence import ledger, provenance, verdicts

        found = self.outcomes()
        slug = self.chapter.slug
        return {
            "chapter": slug,
            "scale": self.scale,
            "seed": self.seed,
            "claims": {claim: verdicts.combine(items) for claim, items in found.items()},
            "tests": {
                item.test.id: ledger.test_record(item.test, item)
                for items in found.values()
                for item in items
            },
            "observations": self.observations,
            **({"tables": self.tables} if self.tables else {}),
            "settings": self.plan.settings,
            "command": self._command(),
            "commit": provenance.git_commit(self.root),
            "hash": provenance.chapter_hash(self.root, slug, self.scale),
            "versions": provenance.versions(),
            "hardware": provenance.hardware(self.device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": round(provenance.seconds_since_start(), 1),
            "peak_memory_mb": provenance.peak_memory_mb(self.device),
        }

    def _command(self) -> str:
        """The command that repeats this run."""
        defaults = {"scale": "small", "seed": 0, "device": "auto", "max_steps": 0}
        defaults |= {"gpus": 1, "strategy": "ddp", "confirm": False}
        words = [f"papermill chapters/{self.chapter.slug}.ipynb out.ipynb"]
        for name, value in self.parameters.items():
            if name == "data_dir" and value:
                words.append("-p data_dir DATA")
            elif name in defaults and value != defaults[name]:
                words.append(f"-p {name} {value}")
        return " ".join([*words, "-p record True"])


def start(slug: str, variables: dict[str, Any], extra: dict[str, type] | None = None) -> Run:
    """Begin a chapter: check the parameters, seed everything, say what will run.

    Args:
        slug: the chapter, as in `chapters/SLUG.yml`.
        variables: the notebook's `globals()`.
        extra: the chapter's own parameters and their types, at most three.

    Raises:
        ValueError: a parameter is unknown, missing, of a wrong type or not allowed. papermill
            only warns about unknown names; here they stop the run before anything is computed.
    """
    from gatebook.evidence import ledger, provenance

    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm wants ipywidgets
    allowed = PARAMETERS | (extra or {})
    if len(allowed) > len(PARAMETERS) + 3:
        raise ValueError("a chapter has at most three parameters of its own")
    given = {name: _checked(name, kind, variables) for name, kind in allowed.items()}
    for name in _assigned_before_start(variables):
        if name not in allowed:
            raise ValueError(unknown("parameter", name, allowed))
    _check_values(given)
    if not given["data_dir"]:
        given["data_dir"] = variables["data_dir"] = os.environ.get("GATEBOOK_DATA", "")
    root = provenance.root()
    run = Run(root, ledger.load_chapter(root, slug), given)
    print(_banner(run))
    if run.scale == "full":
        _price(run, given["confirm"])
    elif run.gpus > 1:
        raise ValueError(f"gpus={run.gpus} is for scale='full'; {run.scale} runs on one device")
    _check_data(run.plan.dataset, given["data_dir"])
    return run


def _price(run: Run, confirm: bool) -> None:
    """Print the price tag; refuse a long run that was not confirmed."""
    from gatebook.training import estimate

    print(price_tag(run.chapter))
    hours = 0.0
    for price in estimate.of_chapter(run.chapter, job=run.job, gpus=run.gpus):
        print("\n".join(price.lines()), flush=True)
        hours += price.gpu_hours
    hours = hours or run.plan.gpu_hours or 0.0
    if hours >= CONFIRM_FROM and not (confirm or run.max_steps):
        raise ValueError(
            f"this run takes about {hours:,.0f} GPU-hours. To start it, set confirm = True "
            "(-p confirm True); to try it, set max_steps"
        )


def _check_data(name: str, data_dir: str) -> None:
    """Open a data set and read its first row, so that what is missing is said before the work."""
    from gatebook.data.images import sources  # with those of pictures

    if name not in sources.DATASETS:
        return  # generated, or chosen by a parameter of the chapter
    split = sources.DATASETS[name].splits[0]
    try:
        row = next(iter(sources.load(name, split, data_dir, streaming=True)))
    except Exception as error:  # readers of damaged or empty files raise what they like
        if type(error) in (ValueError, sources.DataUnavailableError):
            raise  # these are ours, and say what to do
        raise sources.DataUnavailableError(
            f"{name} ({split}) cannot be read ({type(error).__name__}). {sources.how_to_get(name)}"
        ) from error
    if "text" in row and not isinstance(row["text"], str):
        kind = type(row["text"]).__name__
        raise ValueError(f"{name} ({split}): the column text holds {kind}, it needs str")


def price_tag(chapter: Any, scale: str = "full", gpus: int | None = None) -> str:
    """What a run costs: recipe, time, data, and where these figures come from."""
    plan = chapter.scales[scale]
    gpus = gpus or plan.gpus or 1
    lines = [f"{chapter.slug} at scale {scale}: {plan.description}"]
    lines += [f"  {name}: {value}" for name, value in plan.settings.items()]
    if plan.minutes:
        lines.append(f"  time: {plan.minutes:g} min on one {plan.device} device")
    if plan.gpu_hours:
        hours = plan.gpu_hours / gpus
        lines.append(f"  time: {plan.gpu_hours:,.0f} GPU-hours, {hours:,.1f} h on {gpus} GPU(s)")
    if plan.data_gb is not None:
        lines.append(f"  data: {plan.dataset}, {plan.data_gb:,.1f} GB")
    if plan.source:
        lines.append(f"  source of these figures: {plan.source}")
    return "\n".join(lines)


def show_source(*objects: Callable[..., Any] | type) -> None:
    """Show the code of functions and classes of the library, highlighted, without copying it."""
    code = "\n\n".join(inspect.getsource(item).rstrip() for item in objects)
    if not display.in_notebook():
        print(code)
        return
    from IPython.display import Code
    from IPython.display import display as show

    show(Code(code, language="python"))


def _checked(name: str, kind: type, variables: dict[str, Any]) -> Any:
    if name not in variables:
        raise ValueError(f"the parameters cell must set {name!r} ({kind.__name__})")
    value = variables[name]
    if type(value) is not kind:
        raise ValueError(
            f"parameter {name!r} must be of type {kind.__name__}, got {value!r} "
            f"({type(value).__name__})"
        )
    return value


def _check_values(given: dict[str, Any]) -> None:
    from gatebook.evidence.schema import SCALES

    allowed_values = (("scale", SCALES), ("device", DEVICES), ("strategy", ("ddp", "fsdp")))
    for name, allowed in allowed_values:
        if given[name] not in allowed:
            raise ValueError(unknown(name, given[name], allowed))
    for name, least in (("seed", 0), ("max_steps", 0), ("gpus", 1)):
        if given[name] < least:
            raise ValueError(f"parameter {name!r} must be {least} or more, got {given[name]}")
    if given["record"] and given["max_steps"]:
        raise ValueError("record=True needs max_steps=0: a shortened run is not evidence")
    if given["data_dir"] and not Path(given["data_dir"]).expanduser().is_dir():
        raise ValueError(f"data_dir {given['data_dir']!r} is not a folder")


def _assigned_before_start(variables: dict[str, Any]) -> list[str]:
    """Names that the cells up to the first `start` assign, papermill's injected cell included."""
    names: list[str] = []
    for source in variables.get("In", []):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        begins = any(
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "start"
            for node in ast.walk(tree)
        )
        if begins:
            return names
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _pick_device(name: str) -> str:
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        there = ", ".join(device for device, there in available.items() if there)
        raise ValueError(f"device {name!r} is not available here; available: {there}")
    return name


def _seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _banner(run: Run) -> str:
    plan = run.plan
    minutes = f"{plan.minutes:g} min" if plan.minutes else "see the price below"
    return (
        f"{run.chapter.slug} · scale {run.scale} · seeds {run.seeds[0]}–{run.seeds[-1]}"
        f" · planned for {plan.device}, {minutes}\n{plan.description}"
    )
