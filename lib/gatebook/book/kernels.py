"""The page book/kernels: tables and figures from the recorded benchmarks.

Each function of `PARTS` turns the results files into HTML. No number on the page comes from
anywhere else. What was not measured says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatebook.book import targets
from gatebook.book.tables import fold, number, table, times
from gatebook.measure import records
from gatebook.measure.records import Run

RESULTS = Path("benchmarks") / "results"
COMMANDS = {
    "cuda": "python benchmarks/kernels.py gpu",
    "cpu": "python benchmarks/kernels.py cpu",
}
NAMES = {
    "ours": "ours",
    "fla": "flash-linear-attention",
    "sdpa-flash": "FlashAttention-2",
    "sdpa-cudnn": "cuDNN attention",
    "sdpa": "softmax attention",
    "chunked": "ours, plain PyTorch",
    "naive": "recurrence",
    "flips": "two causal calls",
    "causal": "one causal call",
    "floor": "floor",
    "copy": "a copy of as many bytes",
    "ours-compiled": "ours, blocks compiled",
    "llama": "Llama",
    "llama-compiled": "Llama, blocks compiled",
}
HEADS = {"fwd": "forward", "fwdbwd": "forward + backward"}
TIMES = ("fwd", "fwdbwd")
SIZES = {"gla-340m": "GLA-340M", "gla-1.3b": "GLA-1.3B"}


@dataclass(frozen=True)
class Results:
    """The runs that the page shows: the newest first, one kind of hardware each."""

    gpu: tuple[Run, ...]
    cpu: tuple[Run, ...]
    training: tuple[Run, ...] = ()  # of whole models, on the same kind of GPU

    def of(self, case: str) -> tuple[Run, ...]:
        """The runs that a case belongs to."""
        if case.endswith("-training"):
            return self.training
        return self.cpu if case.endswith("-cpu") else self.gpu

    def series(self, case: str, metric: str, method: str) -> dict[int, float]:
        """A metric against length."""
        return records.series(self.of(case), case, metric, method)

    def ratios(self, case: str, metric: str, baseline: str) -> dict[int, float]:
        """How many times better ours is than a baseline of the same run, against length."""
        found: dict[int, float] = {}
        for run in self.of(case):
            ours, other = (records.series([run], case, metric, m) for m in ("ours", baseline))
            for T in set(ours) & set(other):
                ratio = records.ratio(metric, ours[T], other[T])
                if ratio is not None:
                    found.setdefault(T, ratio)
        return dict(sorted(found.items()))

    def methods(self, case: str, metric: str) -> list[str]:
        """The methods that were measured, in the order of `NAMES`."""
        there = {
            r.method
            for run in self.of(case)
            for r in run.records
            if (r.case, r.metric) == (case, metric)
        }
        return [name for name in NAMES if name in there]


def load(root: Path) -> Results:
    """The results to show.

    Raises:
        RecordError: A results file cannot be read.
    """
    runs = records.load(root / RESULTS)
    suites = (("gpu", "cuda"), ("cpu", "cpu"), ("training", "cuda"))
    return Results(*(_of_newest_hardware(runs, *suite) for suite in suites))


def _of_newest_hardware(runs: Sequence[Run], suite: str, device: str) -> tuple[Run, ...]:
    """Runs of a suite on its device: a trial of the GPU suite on a CPU is not shown."""
    fitting = [run for run in runs if run.device == device and run.about["suite"] == suite]
    return tuple(run for run in fitting if run.hardware == fitting[0].hardware)


# --- pieces ---------------------------------------------------------------------------------


def missing(device: str) -> str:
    """What a part shows while its numbers are missing."""
    return (
        '<p class="gb-missing">Not measured yet: <code>'
        f"{COMMANDS[device]}</code> records the numbers that belong here.</p>"
    )


# --- what it ran on -------------------------------------------------------------------------


def provenance(results: Results) -> str:
    """The runs behind the page: hardware, versions, date."""
    shown = (*results.gpu, *results.cpu)
    if not shown:
        return missing("cuda") + missing("cpu")
    head = ("results file", "hardware", "copy", "bf16 matmul", "versions", "date", "commit")
    rows = [
        (
            run.name,
            run.hardware,
            _machine(run, "copy"),
            _machine(run, "matmul"),
            _versions(run),
            run.date[:10],
            run.about.get("commit", "–"),
        )
        for run in shown
    ]
    caption = "What the numbers on this page were measured on"
    return table(caption, head, rows, style="gb-numbers gb-words")


def _versions(run: Run) -> str:
    packages = {"torch": "torch", "triton": "Triton", "flash-linear-attention": "fla"}
    found = run.about["versions"]
    return ", ".join(f"{name} {found[key]}" for key, name in packages.items() if key in found)


def _machine(run: Run, metric: str) -> str:
    found = records.series([run], "machine", metric, "ours")
    return f"{number(found[0])} {records.unit(metric)}" if found else "–"


# --- tables of times ------------------------------------------------------------------------


def times_table(results: Results, case: str, metric: str, caption: str) -> str:
    """One metric of a case: ours, every other method, and how many times faster ours is."""
    others = [name for name in results.methods(case, metric) if name not in ("ours", "floor")]
    ours = results.series(case, metric, "ours")
    fraction = results.ratios(case, metric, "floor")
    head = ["T", "ours", *(NAMES[name] for name in others), *(["floor reached"] * bool(fraction))]
    rows = [
        [
            f"{T:,}",
            number(ours[T]),
            *(_beside(results, case, metric, name, T) for name in others),
            *([_percent(fraction.get(T))] * bool(fraction)),
        ]
        for T in ours
    ]
    return table(caption, head, rows)


def _beside(results: Results, case: str, metric: str, name: str, T: int) -> str:
    value = results.series(case, metric, name).get(T)
    ratio = results.ratios(case, metric, name).get(T)
    return number(value) if ratio is None else f"{number(value)} ({times(ratio)})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def speed(results: Results) -> str:
    """Speed against length for both of the paper's sizes."""
    from gatebook.book import kernel_figures

    parts = []
    for case, name in SIZES.items():
        if not results.series(case, "fwd", "ours"):
            continue
        tables = "".join(
            times_table(results, case, metric, f"{name}, {HEADS[metric]}: ms (times faster)")
            for metric in TIMES
        )
        parts.append(kernel_figures.speed(results, case, name))
        parts.append(fold(f"{name} in numbers", tables))
    return "".join(parts) or missing("cuda")


def memory(results: Results) -> str:
    """Memory against length."""
    from gatebook.book import kernel_figures

    if not results.series("gla-340m", "memory", "ours"):
        return missing("cuda")
    caption = "GLA-340M, forward + backward: MiB beyond the inputs (times less)"
    numbers = times_table(results, "gla-340m", "memory", caption)
    return kernel_figures.memory(results) + fold("Memory in numbers", numbers)


def floor(results: Results) -> str:
    """The fraction of the bandwidth floor that is reached."""
    from gatebook.book import kernel_figures

    found = any(results.ratios(case, "fwd", "floor") for case in SIZES)
    return kernel_figures.floor(results) if found else missing("cuda")


def error(results: Results) -> str:
    """Errors against float64 for output and gradients."""
    from gatebook.book import kernel_figures

    if not results.series("gla-340m", "error", "ours"):
        return missing("cuda")
    return kernel_figures.error(results) + _error_table(results)


def _error_table(results: Results) -> str:
    tensors = {"o": "o", "dq": "dq", "dk": "dk", "dv": "dv", "dg": "d log α"}
    rows = []
    for case, size in (SIZES | {"bigla-340m": "both directions, 340M"}).items():
        for method in ("ours", "fla", "chunked"):
            largest = {name: _largest(results, case, f"error_{name}", method) for name in tensors}
            if case.startswith("bigla"):
                both = (f"error_dg_{way}" for way in ("forward", "backward"))
                found = [x for m in both if (x := _largest(results, case, m, method)) is not None]
                largest["dg"] = max(found, default=None)
            if largest["o"] is not None:
                rows.append((f"{size}, {NAMES[method]}", *(map(number, largest.values()))))
    caption = "Relative RMS error against float64, the largest over all lengths"
    return table(caption, ("operator", *tensors.values()), rows)


def _largest(results: Results, case: str, metric: str, method: str) -> float | None:
    return max(results.series(case, metric, method).values(), default=None)


def both_directions(results: Results) -> str:
    """The bidirectional operator beside what one would do without it."""
    case = "bigla-340m"
    if not results.series(case, "fwd", "ours"):
        return missing("cuda")
    caption = "Both directions, {}: ms (times faster)"
    return "".join(
        times_table(results, case, metric, caption.format(HEADS[metric])) for metric in TIMES
    )


def short(results: Results) -> str:
    """Short sequences one by one, and the decoding step."""
    parts = []
    case = "gla-340m-batch1"
    for metric in ("fwd_wall", "fwdbwd_wall"):
        if results.series(case, metric, "ours"):
            name = HEADS[metric.removesuffix("_wall")]
            caption = f"One short sequence a call, {name}, launches included: ms (times faster)"
            parts.append(times_table(results, case, metric, caption))
    caption = "One token for each of 64 sequences, states read and written, {}: ms (times faster)"
    for metric, words in {"fwd": "alone", "fwd_graph": "among other steps"}.items():
        if results.series("decode-340m", metric, "ours"):
            parts.append(times_table(results, "decode-340m", metric, caption.format(words)))
    return "".join(parts) or missing("cuda")


def cpu(results: Results) -> str:
    """Chunkwise PyTorch on a CPU, with the crossover."""
    from gatebook.book import kernel_figures

    case = "gla-340m-cpu"
    if not results.series(case, "fwd", "ours"):
        return missing("cpu")
    tables = "".join(
        times_table(results, case, metric, f"On a CPU, {HEADS[metric]}: ms (times faster)")
        for metric in TIMES
    )
    numbers = fold("The CPU in numbers", tables)
    return kernel_figures.cpu(results, case) + _cpu_words(results, case) + numbers


def _cpu_words(results: Results, case: str) -> str:
    ours, other = (results.series(case, "fwdbwd", name) for name in ("ours", "sdpa"))
    largest = _largest(results, case, "error", "ours")
    return (
        "<p>Forward and backward together, the chunkwise form is faster than softmax attention "
        f"{records.faster_from(ours, other)}. Its largest relative error against float64, over "
        f"all lengths, the output and the gradients, is {number(largest)}.</p>"
    )


def figure_2(results: Results) -> str:
    """The measurement of the paper's Figure 2 on our kernels."""
    if not results.series("fig2", "fwd", "ours"):
        return missing("cuda")
    caption = "The shape of Figure 2, forward: ms (times faster)"
    return times_table(results, "fig2", "fwd", caption)


def training(results: Results) -> str:
    """Forward and backward of the paper's larger model, beside softmax attention."""
    if not results.series("gla-1.3b", "fwdbwd", "ours"):
        return missing("cuda")
    caption = "One layer of GLA-1.3B, forward + backward: ms (times faster)"
    return times_table(results, "gla-1.3b", "fwdbwd", caption)


def models(results: Results) -> str:
    """Training steps of whole models of 340M parameters: tokens a second, and memory.

    Columns are lengths. Where several runs measured one number, the newest counts.
    """
    case = "gla-340m-training"
    methods = results.methods(case, "step")
    if not methods:
        return "<p><em>Not measured yet: python benchmarks/training.py on a GPU.</em></p>"
    lengths = sorted({T for name in methods for T in results.series(case, "step", name)})
    tokens = {
        r.T: run.about["tokens"] // r.T * r.T for run in results.training for r in run.records
    }
    rows = []
    for name in methods:
        step, memory = (results.series(case, metric, name) for metric in ("step", "memory"))
        speeds = (tokens[T] / step[T] * 1000 if T in step else None for T in lengths)
        largest = f"{max(memory.values()) / 1024:.0f} GiB" if memory else "–"
        rows.append((NAMES[name], *map(number, speeds), largest))
    head = ("model", *(f"T = {T:,}" for T in lengths), "most memory")
    caption = "Training GLA-340M and others of its size: tokens a second"
    return table(caption, head, rows)


def tiles(results: Results) -> str:
    """The drawing of the tiles; it needs no results."""
    from gatebook.book import tiles as drawing

    return drawing.draw()


PARTS: dict[str, Callable[[Results], str]] = {
    "provenance": provenance,
    "tiles": tiles,
    "speed": speed,
    "memory": memory,
    "floor": floor,
    "error": error,
    "both-directions": both_directions,
    "short": short,
    "cpu": cpu,
    "figure-2": figure_2,
    "training": training,
    "models": models,
    "targets": targets.table_of,
}
