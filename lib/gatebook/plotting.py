"""One style for every figure of the book, and one colour for every method.

Figures have a transparent background and mid-grey text, so they read on light and dark pages.
Colours are Okabe and Ito's palette, safe for the common colour-vision deficiencies.
"""

import base64
import html
import io
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
