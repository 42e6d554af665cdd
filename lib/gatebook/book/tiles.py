"""A drawing of the kernels' tiles for heads of GLA-340M, to scale, from the sizes that they use."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from gatebook import plotting
from gatebook.kernels.gated_linear_attention.gpu import plan

KEYS, VALUES = 128, 256  # channels of a head
TILES = plan.tiles(KEYS, VALUES, torch.bfloat16)
UNIT = 16  # tokens or channels; everything below is in this unit
C, K, BLOCK = TILES.chunk / UNIT, KEYS / UNIT, TILES.output.columns / UNIT
BLOCKS = VALUES // TILES.output.columns
READ, KEPT, WRITTEN = plotting.BLUE, plotting.VERMILION, plotting.GREEN
TINT = 0.13
WIDTH = 54
CHUNKS, SEGMENT = 12, 4  # of the last panel
LEFT, STEP, TALL = 7.0, 3.5, 5.8  # its left edge, the width of a chunk, the height of a direction


def draw() -> str:
    """The drawing as HTML: one chunk, one step of the sweep, and who walks where."""
    plotting.style()
    heights = (7.0, 20.0, 17.4)
    fig, axes = plt.subplots(3, 1, figsize=(8.8, 7.7), height_ratios=heights)
    for ax, height in zip(axes, heights, strict=True):
        ax.set(xlim=(0, WIDTH), ylim=(0, height), aspect="equal")
        ax.axis("off")
    _prepare(axes[0])
    _sweep(axes[1])
    _walk(axes[2])
    chunk, columns = TILES.chunk, TILES.output.columns
    return plotting.figure(
        fig,
        alt=f"Three drawings to scale. First: tiles of queries, keys and gates, {chunk} by {KEYS}, "
        "become scaled queries, scaled keys, one row of total decays and a lower triangle of "
        f"scores, {chunk} by {chunk}. Second: one step of the sweep multiplies the triangle with a "
        f"block of {columns} value columns and the scaled queries with the state, {KEYS} by "
        f"{columns}; the state then decays and takes in keys times values. Third: a sequence of "
        f"twelve chunks in three segments and {BLOCKS} blocks of value columns; an arrow in each "
        "walks forward, and below them arrows walk back.",
        caption="The tiles for heads of GLA-340M, to scale. Blue is read from memory, orange stays "
        "in registers, green is written.",
    )


def _tile(ax: Axes, x: float, y: float, size: tuple[float, float], color: str, name: str) -> float:
    """A tile `size` = (tall, wide) with its middle at height y; gives its right edge."""
    tall, wide = size
    low = y - tall / 2
    ax.add_patch(Rectangle((x, low), wide, tall, fc=(color, TINT), ec=color, lw=1.3))
    ax.text(x + wide / 2, y, name, ha="center", va="center", fontsize=9.5)
    return x + wide


def _triangle(ax: Axes, x: float, y: float, color: str, name: str) -> float:
    """P ⊙ M: only the lower triangle of the tile is filled."""
    low = y - C / 2
    ax.add_patch(Rectangle((x, low), C, C, fc="none", ec=color, lw=1.3))
    corners = [(x, low), (x + C, low), (x, low + C)]
    ax.add_patch(Polygon(corners, fc=(color, TINT), ec="none"))
    ax.text(x + 0.37 * C, low + 0.33 * C, name, ha="center", va="center", fontsize=9.5)
    return x + C


def _sign(ax: Axes, x: float, y: float, sign: str, room: float = 1.8) -> float:
    ax.text(x + room / 2, y, sign, ha="center", va="center", fontsize=11)
    return x + room


def _title(ax: Axes, text: str) -> None:
    top = ax.get_ylim()[1]
    ax.text(0, top - 0.1, text, ha="left", va="top", fontsize=10, fontweight="bold")


def _side(ax: Axes, x: float, y: float, text: str, **where: str) -> None:
    ax.text(x, y, text, fontsize=8, **{"ha": "center", "va": "top"} | where)


def _prepare(ax: Axes) -> None:
    _title(ax, "prepare: every chunk of every head at once")
    y = 3.1
    x = _tile(ax, 1.4, y, (C, K), READ, "Q")
    x = _tile(ax, x + 0.7, y, (C, K), READ, "K")
    x = _tile(ax, x + 0.7, y, (C, K), READ, "log α")
    ax.text(1.1, y, f"C = {TILES.chunk}", rotation=90, ha="right", va="center", fontsize=8)
    _side(ax, 1.4 + K / 2, y - C / 2 - 0.2, f"K = {KEYS}")
    left = _sign(ax, x, y, "→", 2.6)
    x = _tile(ax, left, y, (C, K), WRITTEN, "Q ⊙ Λ")
    x = _tile(ax, x + 0.7, y, (C, K), WRITTEN, "K ⊙ Γ")
    _triangle(ax, x + 0.7, y, WRITTEN, "P")
    _tile(ax, left, y - C / 2 - 0.75, (0.5, K), WRITTEN, "")
    _side(ax, left + K + 0.3, y - C / 2 - 0.4, f"γ, 1 × {KEYS}", ha="left")


def _sweep(ax: Axes) -> None:
    _title(ax, "sweep: one step of one program")
    y, wide = 14.0, TILES.output.columns
    x = _tile(ax, 0.4, y, (C, BLOCK), WRITTEN, "O")
    _side(ax, x - BLOCK / 2, y - C / 2 - 0.2, f"{wide} of V = {VALUES}")
    x = _triangle(ax, _sign(ax, x, y, "="), y, READ, "P")
    x = _tile(ax, x + 0.5, y, (C, BLOCK), READ, "V")
    x = _tile(ax, _sign(ax, x, y, "+"), y, (C, K), READ, "Q ⊙ Λ")
    x = _tile(ax, x + 0.5, y, (K, BLOCK), KEPT, "S")
    _side(ax, x + 0.5, y, "the output of\nthis chunk", ha="left", va="center")
    y = 4.9
    x = _tile(ax, 0.4, y, (K, BLOCK), KEPT, "S")
    _side(ax, x - BLOCK / 2, y - K / 2 - 0.2, f"{KEYS} × {wide}")
    x = _tile(ax, _sign(ax, x, y, "←"), y, (K, 0.5), READ, "")
    _side(ax, x - 0.25, y - K / 2 - 0.2, "γ")
    x = _tile(ax, _sign(ax, x, y, "⊙", 1.5), y, (K, BLOCK), KEPT, "S")
    x = _tile(ax, _sign(ax, x, y, "+"), y, (K, C), READ, "(K ⊙ Γ)ᵀ")
    x = _tile(ax, x + 0.5, y, (C, BLOCK), READ, "V")
    _side(ax, x + 0.5, y, "the state for\nthe next chunk", ha="left", va="center")


def _walk(ax: Axes) -> None:
    _title(ax, "who walks where: a program for each head, block of value columns and segment")
    top = 8.0
    _way(ax, top, 1, "forward\nS, gives O")
    _way(ax, 0.5, -1, "backward\ndS, gives dV")
    _side(ax, LEFT + STEP / 2, top - 0.1, "a chunk")
    right, middle = LEFT + CHUNKS * STEP + 0.3, top + TALL / BLOCKS / 2
    _side(ax, right, middle, f"{TILES.output.columns} columns", ha="left", va="center")
    for segment in range(CHUNKS // SEGMENT):
        middle = LEFT + (segment + 0.5) * SEGMENT * STEP
        _side(ax, middle, top + 0.2 + TALL, f"segment {segment + 1}", va="bottom")
    for segment in range(1, CHUNKS // SEGMENT):
        x = LEFT + segment * SEGMENT * STEP
        _side(ax, x, top + 0.2 + TALL, "join", va="bottom", color=KEPT, fontweight="bold")


def _way(ax: Axes, bottom: float, sign: int, name: str) -> None:
    """The programs of one direction, each with an arrow along its chunks."""
    long, row = SEGMENT * STEP, TALL / BLOCKS
    for n in range(CHUNKS + 1):
        x, thick = LEFT + n * STEP, n % SEGMENT == 0
        ax.plot([x, x], [bottom, bottom + TALL], color=plotting.INK, lw=1.8 if thick else 0.5)
    for b in range(BLOCKS + 1):
        y = bottom + b * row
        ax.plot([LEFT, LEFT + CHUNKS * STEP], [y, y], color=plotting.INK, lw=0.5)
    for b in range(BLOCKS):
        for segment in range(CHUNKS // SEGMENT):
            _arrow(ax, LEFT + segment * long, bottom + (b + 0.5) * row, long, sign)
    ax.text(LEFT - 0.5, bottom + TALL / 2, name, ha="right", va="center", fontsize=8.5)


def _arrow(ax: Axes, x: float, y: float, length: float, sign: int) -> None:
    ends = [(x + 0.4, y), (x + length - 0.4, y)][::sign]
    look = {"arrowstyle": "-|>", "color": KEPT, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=ends[1], xytext=ends[0], arrowprops=look)
