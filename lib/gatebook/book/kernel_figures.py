"""The figures of the page book/kernels, drawn from the recorded benchmarks as HTML."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gatebook import plotting
from gatebook.book.kernels import HEADS, NAMES, SIZES, Results
from gatebook.measure import records

# Colour, line and marker of each method; softmax attention is grey throughout the book.
LOOKS: dict[str, tuple[str, str, str]] = {
    "ours": (plotting.color("gla"), "-", "o"),
    "fla": (plotting.series(0), "-", "s"),
    "sdpa-flash": (plotting.color("attention"), "-", "^"),
    "sdpa-cudnn": (plotting.color("attention"), "--", "v"),
    "sdpa": (plotting.color("attention"), "-", "^"),
    "chunked": (plotting.series(2), "-", "D"),
    "naive": (plotting.series(4), "-", "D"),
    "floor": (plotting.INK, ":", ""),
}
ERROR_LIMIT = 5e-3  # of the tests in bfloat16, tests/kernels/gla_cases.py


def speed(results: Results, case: str, name: str) -> str:
    """Time against length at a fixed number of tokens, forward and with backward."""
    plotting.style()
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.9), sharey=True)
    for ax, (metric, title) in zip(axes, HEADS.items(), strict=True):
        _lines(ax, results, case, metric)
        _lengths(ax, results.series(case, metric, "ours"))
        ax.set(yscale="log", title=title)
        _plain(ax)
    axes[0].set_ylabel("time for 32,768 tokens [ms]")
    _legend(fig, axes[1])
    return plotting.figure(
        fig,
        alt=f"Time against sequence length for {name}, forward on the left and forward plus "
        f"backward on the right. {_said(results, case)}",
        caption=f"{name} at 32,768 tokens a call: time against the length of a sequence. "
        "Softmax attention of the same width grows with it.",
    )


def _said(results: Results, case: str) -> str:
    """The ends of our curve in words, for the alternative text."""
    ours = results.series(case, "fwdbwd", "ours")
    first, last = min(ours), max(ours)
    return (
        f"Ours takes {ours[first]:.3g} ms at {first:,} tokens and {ours[last]:.3g} ms at "
        f"{last:,}, forward plus backward; the tables below hold every number."
    )


def memory(results: Results) -> str:
    """Memory against length."""
    plotting.style()
    fig, ax = plt.subplots(figsize=(7.0, 3.4))
    _lines(ax, results, "gla-340m", "memory")
    ours = results.series("gla-340m", "memory", "ours")
    _lengths(ax, ours)
    ax.set(ylabel="peak beyond the inputs [MiB]", ylim=(0, 1.08 * ax.get_ylim()[1]))
    _legend(fig, ax)
    return plotting.figure(
        fig,
        alt=f"Memory against sequence length. Ours needs at most {max(ours.values()):.0f} MiB.",
        caption="GLA-340M, forward + backward of 32,768 tokens: peak memory beyond inputs and "
        "output gradient.",
    )


def floor(results: Results) -> str:
    """The fraction of the bandwidth floor, ours and flash-linear-attention's."""
    plotting.style()
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.6), sharey=True)
    cases = {"gla-340m": "-", "gla-1.3b": "--", "bigla-340m": ":"}
    names = SIZES | {"bigla-340m": "both directions"}
    for ax, (metric, title) in zip(axes, HEADS.items(), strict=True):
        for method in ("ours", "fla"):
            for case, line in cases.items():
                points = _fractions(results, case, metric, method)
                if points:
                    label = f"{names[case]}, {method}"
                    color, _, marker = LOOKS[method]
                    ax.plot(*_xy(points), line, marker=marker, ms=4, color=color, label=label)
        _lengths(ax, results.series("gla-340m", metric, "ours"))
        ax.set(title=title, ylim=(0, 100))
    axes[0].set_ylabel("fraction of the floor [%]")
    _legend(fig, axes[1], columns=3)
    ours = results.ratios("gla-340m", "fwdbwd", "floor")
    return plotting.figure(
        fig,
        alt="Fraction of the bandwidth floor against sequence length. GLA-340M, forward plus "
        f"backward, reaches {100 * min(ours.values()):.0f} to {100 * max(ours.values()):.0f} %.",
        caption="100 % is the time in which inputs and outputs can be copied once for each pass.",
    )


def _fractions(results: Results, case: str, metric: str, method: str) -> dict[int, float]:
    bound = results.series(case, metric, "floor")
    taken = results.series(case, metric, method)
    return {T: 100 * bound[T] / taken[T] for T in taken if T in bound}


def error(results: Results) -> str:
    """Relative error of the output and of each gradient, one mark a length."""
    plotting.style()
    fig, ax = plt.subplots(figsize=(7.0, 3.4))
    tensors = {"o": "o", "dq": "dq", "dk": "dk", "dv": "dv", "dg": "d log α"}
    methods = [m for m in ("ours", "fla", "chunked") if results.series("gla-340m", "error", m)]
    for i, method in enumerate(methods):
        color, _, marker = LOOKS[method]
        for place, name in enumerate(tensors):
            values = list(results.series("gla-340m", f"error_{name}", method).values())
            x = [place + 0.22 * (i - (len(methods) - 1) / 2)] * len(values)
            ax.plot(
                x,
                values,
                marker,
                ms=4.5,
                alpha=0.55,
                color=color,
                ls="",
                label=NAMES[method] if place == 0 else None,
            )
    ax.axhline(ERROR_LIMIT, color=plotting.INK, ls="--", lw=1.2, label="limit of the tests")
    ax.set_xticks(range(len(tensors)), tensors.values())
    ax.set(yscale="log", ylabel="relative RMS error", ylim=(None, 1.4 * ERROR_LIMIT))
    _plain(ax)
    _legend(fig, ax)
    largest = max(results.series("gla-340m", "error", "ours").values())
    return plotting.figure(
        fig,
        alt="Relative RMS errors of the output and of the gradients of q, k, v and the gates. "
        f"The largest of ours is {largest:.1e}; the limit of the tests is {ERROR_LIMIT:g}.",
        caption="GLA-340M in bfloat16 against float64: one mark for each length from 64 to 32,768.",
    )


def cpu(results: Results, case: str) -> str:
    """Time against length on a CPU, with the crossover."""
    plotting.style()
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.9), sharey=True)
    said = []
    for ax, (metric, title) in zip(axes, HEADS.items(), strict=True):
        _lines(ax, results, case, metric)
        ours, other = (results.series(case, metric, name) for name in ("ours", "sdpa"))
        _lengths(ax, ours)
        at = records.crossover(ours, other)
        if at:
            ax.axvline(at, color=plotting.INK, ls=":", lw=1.2)
            ax.annotate(f" {at:,.0f} tokens", (at, 0.04), xycoords=("data", "axes fraction"))
            said.append(f"{title}: {at:,.0f} tokens")
        ax.set(yscale="log", title=title)
        _plain(ax)
    axes[0].set_ylabel("time for one sequence [ms]")
    _legend(fig, axes[1])
    return plotting.figure(
        fig,
        alt="Time against sequence length on a CPU, log-log: the chunkwise form and the "
        "recurrence are straight lines of slope one, softmax attention is steeper. "
        f"Crossings with softmax attention: {'; '.join(said) or 'none'}.",
        caption="One sequence on the CPU in float32, heads of GLA-340M against softmax attention "
        "with 16 heads of 64." + (" The dotted line is where they cross." if said else ""),
    )


# --- pieces ---------------------------------------------------------------------------------


def _lines(ax: Axes, results: Results, case: str, metric: str) -> None:
    for method in results.methods(case, metric):
        color, line, marker = LOOKS[method]
        points = results.series(case, metric, method)
        ours = {"lw": 2.4, "zorder": 3} if method == "ours" else {}
        name = (
            "ours, plain PyTorch" if case.endswith("-cpu") and method == "ours" else NAMES[method]
        )
        ax.plot(*_xy(points), line, marker=marker, ms=4.5, color=color, label=name, **ours)


def _xy(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _lengths(ax: Axes, lengths: Iterable[int]) -> None:
    ax.set_xscale("log", base=2)
    shown = sorted(lengths)
    ax.set_xticks(shown, [f"{T // 1024}K" if T >= 1024 else str(T) for T in shown])
    ax.minorticks_off()
    ax.set_xlabel("length of a sequence [tokens]")


def _plain(ax: Axes) -> None:
    """Decimal labels at 1, 2, 5, 10, … instead of powers of ten."""
    low, high = ax.get_ylim()
    steps = [m * 10.0**e for e in range(-8, 6) for m in (1, 2, 5)]
    shown = [step for step in steps if low <= step <= high]
    if len(shown) > 8:
        shown = [step for step in shown if f"{step:e}"[0] == "1"]
    ax.set_yticks(shown, [f"{step:g}" for step in shown])
    ax.minorticks_off()


def _legend(fig: Figure, ax: Axes, columns: int = 4) -> None:
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=9
    )
