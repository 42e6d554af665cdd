"""One style for every figure of the book, and one colour for every method.

Figures have a transparent background and mid-grey text, so they read on light and dark pages.
Colours are Okabe and Ito's palette, safe for the common colour-vision deficiencies.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from gatebook.errors import unknown

INK = "#7a7a7a"  # contrast of at least 4.2 on white and on the dark theme's background
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#c9b81b",
    "#8a8a8a",
)

# One colour for each method throughout the book. Variants inside one chapter use `series`.
METHODS: dict[str, str] = {
    "attention": GREY,
    "transformer": GREY,
    "attention without positions": "#b5b5b5",
    "attention with normed keys": "#6e6e6e",
    "gated attention": "#a97c50",
    "sqa": "#5c6e91",
    "moh": "#8f5d7f",
    "linear attention": SKY,
    "fixed decay": "#88ccee",
    "retnet": GREEN,
    "mamba": PURPLE,
    "mamba-2": PURPLE,
    "gla": VERMILION,
    "hgrn": "#44aa99",
    "hgrn2": "#2e8b57",
    "deltanet": "#7a6ff0",
    "gated deltanet": "#aa3377",
    "gam": BLUE,
    "lstm": "#3b3b3b",
    "mlp-mixer": "#b5b5b5",
    "hornet": "#2e8b57",
    "shvit": "#aa3377",
    "convit": "#5c6e91",
    "activator": "#a97c50",
    "ninformer": "#88ccee",
    "svt": PURPLE,
    "gated swinrmt": "#7a6ff0",
    "vit reparam": "#8f5d7f",
    "swin": ORANGE,
    "mossformer": YELLOW,
}


def style() -> None:
    """Set matplotlib's defaults for the book."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 110,
            "figure.facecolor": "none",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "none",
            "axes.facecolor": "none",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.prop_cycle": mpl.cycler(
                color=[BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY]
            ),
            "grid.color": INK,
            "grid.alpha": 0.25,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 1.8,
            "font.size": 10,
            "svg.hashsalt": "gatebook",
        }
    )


def color(method: str) -> str:
    """The colour of a method, the same in every chapter.

    Raises:
        ValueError: the method has no colour yet; add it to `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    return METHODS[method]


def series(index: int) -> str:
    """The colour of a chapter's variant number `index`, counted from 0 (at most eight)."""
    return [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, YELLOW, GREY][index]


def accuracy_against_cost(rows: Sequence[Mapping[str, Any]], time_label: str) -> Figure:
    """Accuracy of some arms against their operations and against their measured time.

    Args:
        rows: For each arm `arm` (its name), `accuracy` (per cent, one a seed), `macs` (10⁶
            multiply-adds of an image) and `time`; at most eight.
        time_label: What `time` is, with its unit.

    Returns:
        Two panels with one scale of accuracy: a dot for each seed, a bar at the mean.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.3), sharey=True)
    for number, row in enumerate(rows):
        shade, found = series(number), list(row["accuracy"])
        for ax, cost in zip(axes, (row["macs"], row["time"]), strict=True):
            ax.plot([cost] * len(found), found, "o", color=shade, alpha=0.5, ms=5)
            ax.plot(cost, sum(found) / len(found), "_", color=shade, ms=18, mew=2.5)
        axes[1].plot([], [], "s", color=shade, label=row["arm"])
    for ax, label in zip(axes, ("multiply-adds of an image (10⁶)", time_label), strict=True):
        ax.set(xlabel=label, xlim=(0, 1.1 * ax.dataLim.x1))
    axes[0].set(ylabel="held-out accuracy (%)")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig


def show(fig: Figure, alt: str, caption: str) -> None:
    """Display a figure with alternative text and a caption, and close it.

    Args, Raises as `figure`.
    """
    _display(figure(fig, alt, caption))


def figure(fig: Figure, alt: str, caption: str) -> str:
    """A figure as HTML with alternative text and a caption; closes it.

    Args:
        fig: the figure.
        alt: what the picture shows, for those who do not see it.
        caption: its one message.

    Raises:
        ValueError: `alt` or `caption` is empty.
    """
    if not alt.strip() or not caption.strip():
        raise ValueError("a figure needs alternative text and a caption")
    buffer = io.BytesIO()
    quality = {"quality": 85}  # a third of the size of a PNG
    fig.savefig(buffer, format="webp", dpi=150, bbox_inches="tight", pil_kwargs=quality)
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure class="gb-figure"><img alt="{html.escape(alt, quote=True)}" '
        f'src="data:image/webp;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def _display(text: str) -> Any:
    from IPython.display import HTML, display

    display(HTML(text))
