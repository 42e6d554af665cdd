"""Tables and figures of a comparison of mixers."""

import html
import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

from gatebook import display, plotting
from gatebook.mixers.compare import Trial

Row = dict[str, Any]

# The name of a mixer in `plotting.METHODS`, and its mark, by kind of memory.
STYLES: dict[str, tuple[str, str]] = {
    "softmax": ("attention", "o"),
    "softmax_nope": ("attention without positions", "o"),
    "softmax_qk_norm": ("attention with normed keys", "o"),
    "gated_softmax": ("gated attention", "o"),
    "sqa": ("sqa", "o"),
    "moh": ("moh", "o"),
    "linear": ("linear attention", "s"),
    "gla_fixed": ("fixed decay", "s"),
    "retnet": ("retnet", "s"),
    "mamba2": ("mamba-2", "s"),
    "gla": ("gla", "s"),
    "hgrn": ("hgrn", "v"),
    "hgrn2": ("hgrn2", "s"),
    "deltanet": ("deltanet", "D"),
    "gated_deltanet": ("gated deltanet", "D"),
    "gam": ("gam", "v"),
    "lstm": ("lstm", "P"),
}


def rows(trials: list[tuple[Trial, dict[str, float]]]) -> list[Row]:
    """Scored trials as rows to keep with the evidence, one for each run and condition.

    A number that is not finite, of a run that diverged, is None.
    """
    found = []
    for trial, scores in trials:
        about = {"mixer": trial.mixer, "task": trial.task, "lr": trial.lr, "seed": trial.seed}
        about["choosing"] = trial.choosing
        for condition, value in scores.items():
            number = value if math.isfinite(value) else None
            found.append(about | {"condition": condition, "value": number})
    return found


def observe(run: Any, metric: str, mixer: str, value: float, seed: int | str | None = None) -> None:
    """Give a number to the chapter's tests, if one of them asks for it."""
    if any(test.metric == metric and mixer in test.arms for test in run.chapter.tests()):
        run.observe(metric, mixer, value, seed=seed)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, by the t distribution; 0 for a single value."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * spread / math.sqrt(len(values)))


WIDEST = 7  # columns of a table, beside that of the names


def table_html(kept: list[Row]) -> str:
    """Mixers by conditions, mean and interval over seeds; see `table`."""
    final = [row for row in kept if not row["choosing"] and row["condition"] != "loss"]
    columns = list(dict.fromkeys((row["task"], row["condition"]) for row in final))
    parts: list[list[tuple[str, str]]] = []
    for task in dict.fromkeys(task for task, _ in columns):
        own = [column for column in columns if column[0] == task]
        if parts and len(parts[-1]) + len(own) <= WIDEST:
            parts[-1] += own
        else:
            parts.append(own)
    rates = sorted({row["lr"] for row in kept if row["choosing"]})
    tables = "".join(_part_html(final, part, rates) for part in parts)
    return (
        '<div class="gb-scroll" role="region" tabindex="0" aria-label="Scores of the mixers">'
        f"{tables}</div>"
    )


def _part_html(final: list[Row], columns: list[tuple[str, str]], rates: list[float]) -> str:
    mixers = list(dict.fromkeys(row["mixer"] for row in final))
    found = {
        (mixer, task, condition): _summary(final, mixer, task, condition)
        for mixer in mixers
        for task, condition in columns
    }
    head = "".join(f'<th scope="col">{html.escape(condition)}</th>' for _, condition in columns)
    body = ""
    for mixer in mixers:
        cells = ""
        for task, condition in columns:
            column = [found[other, task, condition] for other in mixers]
            cells += _cell(found[mixer, task, condition], column, task == "text", rates)
        body += f'<tr><th scope="row">{html.escape(mixer)}</th>{cells}</tr>'
    return (
        '<table style="min-width: 60%; white-space: nowrap"><caption style="white-space: normal">'
        "Loss in nats a byte for text, share of right answers elsewhere; ± 95 % interval; below, "
        'the learning rate</caption><thead><tr><th scope="col">mixer</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def table(kept: list[Row]) -> None:
    """Show which mixer wins what.

    The best mean of a column is bold, with all whose interval overlaps with its own; an asterisk
    marks a learning rate at an end of the grid.

    Args:
        kept: Rows of `rows`.
    """
    display.show_html(table_html(kept))


def _summary(final: list[Row], mixer: str, task: str, condition: str) -> dict[str, Any]:
    own = [
        row
        for row in final
        if (row["mixer"], row["task"], row["condition"]) == (mixer, task, condition)
    ]
    values = [row["value"] for row in own if row["value"] is not None]
    if not values or len(values) < len(own):
        return {"mean": None, "half": 0.0, "lr": own[0]["lr"] if own else None}
    mean, half = interval(values)
    return {"mean": mean, "half": half, "lr": own[0]["lr"]}


def _cell(found: dict, column: list[dict], lower: bool, rates: list[float]) -> str:
    if found["mean"] is None:
        return "<td>diverged</td>"
    sign = -1 if lower else 1
    best = max((c for c in column if c["mean"] is not None), key=lambda c: sign * c["mean"])
    ties = sign * (best["mean"] - found["mean"]) <= best["half"] + found["half"]
    end = "*" if len(rates) > 1 and found["lr"] in (rates[0], rates[-1]) else ""
    digits = 3 if lower else 2
    text = f"{found['mean']:.{digits}f}"
    text += f" ± {found['half']:.{digits}f}" if found["half"] else ""
    rate = f"<br><small>{found['lr']:g}{end}</small>"
    return f"<td>{f'<strong>{text}</strong>' if ties else text}{rate}</td>"


def style(mixer: str) -> str:
    """The colour of a mixer of the book, the same on every page."""
    return plotting.color(STYLES[mixer][0])


def _style(mixer: str, others: int) -> tuple[str, str]:
    """Colour and mark; a mixer that is not the book's takes those of the series."""
    if mixer in STYLES:
        return style(mixer), STYLES[mixer][1]
    return plotting.series(others % 8), "*"


def _lines(
    ax: Any, mixers: list[str], points: Callable[[str], tuple[list[float], list[float]]]
) -> None:
    others = 0
    for mixer in mixers:
        color, mark = _style(mixer, others)
        others += mixer not in STYLES
        x, y = points(mixer)
        ax.plot(x, y, mark + "-", color=color, label=mixer.replace("_", " "), markersize=4.5)


def recall_figure(kept: list[Row], task: str = "recall") -> None:
    """Show recall against the number of pairs, one line a mixer.

    Args:
        kept: Rows of `rows`.
        task: Name of the recall task.
    """
    final = [row for row in kept if row["task"] == task and not row["choosing"]]
    pairs = sorted({int(r["condition"].split()[0]) for r in final if "pairs" in r["condition"]})
    mixers = list(dict.fromkeys(row["mixer"] for row in final))

    def points(mixer: str) -> tuple[list[float], list[float]]:
        means = [_summary(final, mixer, task, f"{count} pairs")["mean"] for count in pairs]
        return pairs, [math.nan if mean is None else mean for mean in means]

    fig, ax = plt.subplots(figsize=(7, 3.8))
    _lines(ax, mixers, points)
    ax.set(xlabel="pairs of a key and a value", ylabel="share of right answers", ylim=(-0.03, 1.03))
    ax.set_xscale("log", base=2)
    ax.set_xticks(pairs, pairs)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plotting.show(
        fig,
        alt="Share of right answers against the number of pairs for each mixer: "
        + "; ".join(f"{m} {points(m)[1][-1]:.2f} at {pairs[-1]}" for m in mixers),
        caption="Recall against the number of pairs. Circles keep a list, squares a sum, diamonds "
        "a corrected sum, triangles neither.",
    )


def cost_figure(costs: list[Row], *, device: str) -> None:
    """Show time and memory against length: training, decoding, and state.

    Args:
        costs: A row for each mixer, repeat and length, with the fields of `compare.Cost`.
        device: "cpu" or "cuda", for the caption.
    """
    mixers = list(dict.fromkeys(row["mixer"] for row in costs))
    lengths = sorted({row["length"] for row in costs})

    def points(mixer: str, field: str) -> tuple[list[float], list[float]]:
        found = [
            [r[field] for r in costs if (r["mixer"], r["length"]) == (mixer, n)] for n in lengths
        ]
        middle = [sorted(v for v in values if v is not None) for values in found]
        return lengths, [values[len(values) // 2] if values else math.nan for values in middle]

    fields = {
        "train_us": "training [µs a token]",
        "decode_ms": "decoding [ms a token]",
        "state_bytes": "state of a sequence [bytes]",
    }
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        _lines(ax, mixers, lambda mixer, field=field: points(mixer, field))
        ax.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        ax.set_xticks(lengths, lengths, rotation=40, ha="right")
        ax.minorticks_off()
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    end = {m: points(m, "state_bytes")[1][-1] for m in mixers}
    plotting.show(
        fig,
        alt="Three panels against length: training time for a token, decoding time for a token, "
        f"bytes of state. At {lengths[-1]} tokens the state takes "
        + "; ".join(f"{m} {size:,.0f} bytes" for m, size in end.items()),
        caption="What a mixer costs against length: time of training, time of decoding, size of "
        f"the state. Median of three, on {'a GPU' if device == 'cuda' else 'a CPU'}.",
    )
