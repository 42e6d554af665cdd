"""Figures carry alternative text, a caption and an image that every browser reads."""

import re

import matplotlib.pyplot as plt
import pytest

from gatebook import plotting


def test_a_figure_has_alternative_text_and_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(plotting, "_display", shown.append)
    plotting.style()
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    plotting.show(fig, alt='rises from "1"', caption="It rises.")
    assert 'alt="rises from &quot;1&quot;"' in shown[0]
    assert "<figcaption>It rises.</figcaption>" in shown[0]
    assert re.search(r'src="data:image/webp;base64,UklGR', shown[0])  # "RIFF", WebP's first bytes
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("words", [{"alt": " ", "caption": "x"}, {"alt": "x", "caption": ""}])
def test_a_figure_without_words_is_refused(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="alternative text and a caption"):
        plotting.show(plt.figure(), **words)


def test_one_colour_for_each_method() -> None:
    assert len({plotting.color(name) for name in ("gla", "retnet", "mamba", "gam")}) == 4
    with pytest.raises(ValueError, match="Did you mean 'gla'"):
        plotting.color("glaa")


def test_ink_is_readable_on_light_and_dark() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = luminance(plotting.INK)
    for page in ("#ffffff", "#14181e"):
        high, low = sorted((ink, luminance(page)), reverse=True)
        assert (high + 0.05) / (low + 0.05) > 4


def test_accuracy_against_cost_has_a_dot_a_seed_and_a_bar_at_the_mean() -> None:
    rows = [
        {"arm": "one", "accuracy": [50.0, 60.0], "macs": 10.0, "time": 3.0},
        {"arm": "two", "accuracy": [70.0], "macs": 20.0, "time": 2.0},
    ]
    fig = plotting.accuracy_against_cost(rows, "time (ms)")
    for ax, key in zip(fig.axes, ("macs", "time"), strict=True):
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
        for row in rows:
            mean = sum(row["accuracy"]) / len(row["accuracy"])
            assert ([row[key]] * len(row["accuracy"]), row["accuracy"]) in drawn
            assert ([row[key]], [mean]) in drawn
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["one", "two"]
    assert fig.axes[1].get_xlabel() == "time (ms)"
    plt.close(fig)
