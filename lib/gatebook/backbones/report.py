"""Tables and the figures of the comparison of backbones."""

import html
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gatebook import display, plotting
from gatebook.mixers.report import interval

Row = dict[str, Any]

# The name of a backbone in `plotting.METHODS`, and the mark of what mixes its tokens.
STYLES: dict[str, tuple[str, str]] = {
    "vit": ("transformer", "o"),
    "mlp_mixer": ("mlp-mixer", "s"),
    "swin": ("swin", "o"),
    "gated_swinrmt": ("gated swinrmt", "o"),
    "convit": ("convit", "o"),
    "shvit": ("shvit", "D"),
    "vig": ("gla", "v"),
    "hornet": ("hornet", "^"),
    "svt": ("svt", "^"),
    "activator": ("activator", "s"),
    "ninformer": ("ninformer", "s"),
}
MARKS = (
    "Circles attend, the diamond with one head on a part of the channels; squares are MLPs; "
    "triangles gate, scan or filter."
)
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
WIDEST = 7  # columns of a table beside that of the names: more do not fit the page


def scores(rows: list[Row], size: str) -> dict[str, tuple[float, float, int, int]]:
    """Accuracy of each backbone of a size over the seeds.

    Returns:
        By backbone: mean and half of its 95 % interval, nan if a run diverged, for then there is
        no mean; the number of runs; the number of those that diverged.
    """
    found: dict[str, list[float | None]] = {}
    for row in rows:
        if row["size"] == size:
            found.setdefault(row["backbone"], []).append(row["accuracy"])
    lost = {name: values.count(None) for name, values in found.items()}
    nan = float("nan")
    return {
        name: (*((nan, nan) if lost[name] else interval(values)), len(values), lost[name])
        for name, values in found.items()
    }


def table(rows: list[Row], costs: list[Row]) -> None:
    """Show accuracy and costs of every backbone, the best first; columns without numbers are left.

    Args:
        rows: backbone, size, seed, accuracy (a share, or None) of each run.
        costs: backbone, size and the fields of `Cost` for each measurement.
    """
    sizes = list(dict.fromkeys(row["size"] for row in costs))
    display.show_html("".join(_tables(rows, costs, size) for size in sizes))


def _tables(rows: list[Row], costs: list[Row], size: str) -> str:
    """One table for a size, or one for each side of pictures if that is too wide."""
    accuracy = scores(rows, size)
    own = [row for row in costs if row["size"] == size]
    names = list(dict.fromkeys(row["backbone"] for row in own))
    names.sort(key=lambda name: -_mean(accuracy, name))  # stable: equal ones keep their order
    first = [("parameters", lambda name: f"{_of(own, name)[0]['parameters']:,}")]
    if accuracy:
        first.insert(0, ("accuracy [%]", lambda name: _accuracy(accuracy.get(name))))
    groups = [_columns(own, pixels) for pixels in sorted({row["pixels"] for row in own})]
    if len(first) + sum(map(len, groups)) <= WIDEST:
        groups = [[column for group in groups for column in group]]
    title = f"Backbones of about {size} parameters"
    title += "; ± 95 % interval over seeds" * bool(accuracy)
    title += "; MB: training memory for a picture" * any(row["memory"] for row in own)
    return "".join(_html(title, names, first + group) for group in groups)


Column = tuple[str, Callable[[str], str]]


def _columns(own: list[Row], pixels: int) -> list[Column]:
    """What there are numbers of, at one side of pictures."""

    def column(head: str, field: str, device: str = "", unit: float = 1.0) -> list[Column]:
        fits = [
            row
            for row in own
            if row["pixels"] == pixels and row["device"].startswith(device) and row[field]
        ]
        cell = lambda name: _number([row[field] / unit for row in _of(fits, name)])  # noqa: E731
        return [(f"{head}, {pixels}²", cell)] if fits else []

    found = column("MFLOPs", "flops", unit=1e6)
    for device, name in DEVICES.items():
        found += column(f"images/s, {name}", "images_per_second", device)
    return found + column("MB", "memory", "cuda", unit=1e6)


def _of(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["backbone"] == name]


def _mean(accuracy: dict[str, tuple[float, float, int, int]], name: str) -> float:
    mean = accuracy.get(name, (0.0,))[0]
    return mean if mean == mean else -1.0  # one that diverged comes last


def _html(title: str, names: list[str], columns: list[Column]) -> str:
    head = "".join(f'<th scope="col">{h}</th>' for h in ("backbone", *dict(columns)))
    body = ""
    for name in names:
        cells = "".join(f"<td>{cell(name)}</td>" for _, cell in columns)
        body += f'<tr><th scope="row">{html.escape(name.replace("_", " "))}</th>{cells}</tr>'
    return (
        '<div class="gb-scroll" role="region" tabindex="0" aria-label="Accuracy and costs">'
        f'<table style="font-size: 85%"><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _accuracy(found: tuple[float, float, int, int] | None) -> str:
    if found is None:
        return "–"
    mean, half, seeds, lost = found
    if lost:
        return f"{lost} of {seeds} diverged"
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if seeds > 1 else "")


def _number(values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def _speed(costs: list[Row], name: str, size: str, pixels: int, device: str) -> float | None:
    """Mean images a second, or None without a measurement."""
    at = (size, pixels, device)
    found = [
        row["images_per_second"]
        for row in _of(costs, name)
        if (row["size"], row["pixels"], row["device"]) == at and row["images_per_second"]
    ]
    return sum(found) / len(found) if found else None


def _panel(ax: Axes, places: dict[str, tuple[float, float]]) -> None:
    """Marks of the backbones, and their names beside the panel, each with a line to its mark.

    Call it after the scales of the axes are set.
    """
    for name, place in places.items():
        color, mark = STYLES.get(name, ("transformer", "X"))
        ax.plot(*place, mark, ms=8, color=plotting.color(color))
    ax.margins(x=0.08, y=0.1)
    ax.autoscale_view()
    to_axes = ax.transData + ax.transAxes.inverted()
    order = sorted(places, key=lambda name: to_axes.transform(places[name])[1])
    for number, name in enumerate(order):
        height = (number + 0.5) / len(order)
        ax.annotate(
            name.replace("_", " "),
            places[name],
            xytext=(1.06, height),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=10,
            arrowprops={"arrowstyle": "-", "color": plotting.INK, "lw": 0.5, "alpha": 0.6},
        )


def _plain(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def cost_figure(costs: list[Row], *, size: str, device: str) -> None:
    """Images a second against FLOPs, at both sizes of pictures: the same parameters differ in work.

    Args:
        costs: As for `table`.
        size: Of the backbones.
        device: Where they were timed, cpu or cuda.
    """
    own = [row for row in costs if (row["size"], row["device"]) == (size, device)]
    sides = sorted({row["pixels"] for row in own})
    fig, axes = plt.subplots(len(sides), 1, figsize=(7.2, 3.5 * len(sides)), squeeze=False)
    for ax, pixels in zip(axes[:, 0], sides, strict=True):
        here = [row for row in own if row["pixels"] == pixels]
        ax.set(xscale="log", yscale="log", title=f"pictures of {pixels}² pixels, {DEVICES[device]}")
        ax.set(xlabel="MFLOPs of a picture", ylabel="images a second")
        places = {
            name: (_of(here, name)[0]["flops"] / 1e6, _speed(own, name, size, pixels, device))
            for name in dict.fromkeys(row["backbone"] for row in here)
        }
        _panel(ax, places)
        _plain(ax.xaxis)
        _plain(ax.yaxis)
    plotting.show(
        fig,
        alt="Images a second against floating-point operations of a picture, a mark for each "
        "backbone of about the same number of parameters, at 32 and at 224 pixels.",
        caption=f"Equal parameters, {size}, are neither equal work nor equal time. {MARKS}",
    )


def figure(rows: list[Row], costs: list[Row], *, size: str, pixels: int) -> None:
    """Accuracy against work and, for each device that was timed, against images a second.

    Args:
        rows, costs: As for `table`.
        size: Of the backbones.
        pixels: Side of the pictures that were counted and timed.
    """
    accuracy = {name: found for name, found in scores(rows, size).items() if not found[3]}
    lost = sorted({row["backbone"] for row in rows if row["size"] == size} - set(accuracy))
    work = {
        row["backbone"]: row["flops"] / 1e6
        for row in costs
        if (row["size"], row["pixels"]) == (size, pixels)
    }
    panels = {f"MFLOPs of a picture of {pixels}² pixels": work}
    for device, label in DEVICES.items():
        speeds = {name: _speed(costs, name, size, pixels, device) for name in accuracy}
        if all(speeds.values()):
            panels[f"images of {pixels}² pixels a second, {label}"] = speeds
    fig, axes = plt.subplots(len(panels), 1, figsize=(7.2, 3.5 * len(panels)), squeeze=False)
    for ax, (label, found) in zip(axes[:, 0], panels.items(), strict=True):
        ax.set(xscale="log", xlabel=label, ylabel="test accuracy [%]")
        places = {}
        for name, (mean, half, *_) in accuracy.items():
            places[name] = (found[name], 100 * mean)
            ax.errorbar(*places[name], yerr=100 * half, color=plotting.color(STYLES[name][0]))
        _panel(ax, places)
        _plain(ax.xaxis)
    plotting.show(
        fig,
        alt="Test accuracy against the work for a picture and, where it was timed, against "
        "throughput, a mark for each backbone with its 95 percent interval.",
        caption=f"Backbones of about {size} parameters, one recipe. Up is more accurate; less work "
        f"is to the left, more speed to the right. {MARKS}"
        + (f" Not shown, because runs diverged: {', '.join(lost)}." if lost else ""),
    )
