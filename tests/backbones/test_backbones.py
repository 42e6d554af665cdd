"""The comparison of backbones: entries, pictures, trials, costs, tables."""

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.text import Text

from gatebook import backbones, measure, models
from gatebook.backbones import Entry, Trial, report

ROOT = Path(__file__).resolve().parents[2]
SCALES = yaml.safe_load((ROOT / "chapters/backbones.yml").read_text())["scales"]
ENTRIES = backbones.entries(SCALES["medium"]["settings"]["backbones"])
WANTED = {"1M": 1e6, "5M": 5e6}
TINY = Entry(
    model="deit_ti",
    sizes={
        "tiny": {
            "d_model": 32,
            "depth": 1,
            "n_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "init_std": 0.0,
            "class_token": False,
        }
    },
    large={"image_size": 224, "patch_size": 32},
)
TRIAL = Trial(
    backbone="vit",
    size="tiny",
    seed=0,
    entry=asdict(TINY),
    corpus="digits",
    batch=64,
    recipe={"steps": 300, "lr": 5e-3, "warmup_steps": 20},
    mixing={},
    data_dir="",
    device="cpu",
)


def test_all_scales_have_the_same_backbones():
    assert all(
        plan["settings"]["backbones"] == SCALES["medium"]["settings"]["backbones"]
        for plan in SCALES.values()
    )


def test_every_backbone_of_the_book_takes_part():
    """Every model that classifies pictures, and its file is one that evidence depends on."""
    configs = map(models.config, models.list_models())
    vision = {type(c).__module__ for c in configs if {"n_classes", "image_size"} <= set(vars(c))}
    vision -= {"gatebook.models.vit_reparam"}  # a way to train a ViT of fewer layers
    assert {type(models.config(entry.model)).__module__ for entry in ENTRIES.values()} == vision
    assert vision == backbones.MODULES


@pytest.mark.parametrize("size", WANTED)
@pytest.mark.parametrize("name", ENTRIES)
def test_sizes_are_near_what_they_are_called(name, size):
    with torch.device("meta"):
        model = ENTRIES[name].build(size)
    assert abs(measure.parameters(model) / WANTED[size] - 1) < 0.03


def test_an_entry_can_start_from_weights_of_variance_one_over_fan_in():
    torch.manual_seed(0)
    own, ours = (replace(ENTRIES["hornet"], fan_in=x).build("1M") for x in (False, True))
    for model, std in ((own, 0.02), (ours, 128**-0.5)):
        weight = model.stages[-1][0].mlp[0].weight
        assert weight.shape[1] == 128
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert not ours.stages[-1][0].mlp[0].bias.any()
    assert ENTRIES["hornet"].fan_in
    assert [name for name, entry in ENTRIES.items() if entry.fan_in] == ["hornet"]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_backbone_classifies_and_learns_at_both_resolutions(name):
    torch.manual_seed(0)
    model = ENTRIES[name].build("1M")
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert idle == []
    with torch.no_grad():
        large = ENTRIES[name].build("1M", large=True).eval()
        assert large(torch.randn(1, 3, 224, 224)).shape == (1, 10)


def test_entries_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="depth"):
        Entry(model="deit_ti", sizes={"1M": {"depths": 3}}, large={})
    with pytest.raises(ValueError, match="tiny"):
        TINY.build("tinny")


def test_digits_are_parted_and_keep_their_classes():
    train, test = (backbones.pictures("digits", part) for part in ("train", "test"))
    assert (len(train), len(test)) == (1348, 449)
    assert train.pixels.shape[1:] == (3, 32, 32)
    assert not train.flips
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    assert torch.equal(train.pixels[:, 0], train.pixels[:, 2])
    with pytest.raises(ValueError, match="cifar10"):
        backbones.pictures("cifar", "train")


def test_a_trial_learns_and_follows_from_its_seed():
    first, second = (backbones.run_trial(TRIAL) for _ in range(2))
    other = backbones.run_trial(replace(TRIAL, seed=1))
    assert first == second != other
    assert first["accuracy"] > 0.4  # chance is 0.1


def test_held_out_pictures_are_not_trained_on_and_are_scored():
    digits = backbones.pictures("digits", "train")
    rest, apart = backbones._parted(digits, 300)
    assert (len(rest), len(apart)) == (len(digits) - 300, 300)
    assert torch.equal(torch.cat([rest.pixels, apart.pixels]), digits.pixels)
    assert torch.equal(torch.cat([rest.labels, apart.labels]), digits.labels)
    assert not rest.flips
    short = replace(TRIAL, recipe={"steps": 5, "lr": 5e-3})
    found = backbones.run_trial(replace(short, held_out=300))
    assert round(found["accuracy"] * 300, 6).is_integer()
    assert found != backbones.run_trial(short)


def test_a_process_decodes_a_corpus_once():
    first, second = (backbones.pictures("digits", "train", "", "cpu") for _ in range(2))
    assert first is second


@pytest.mark.parametrize(
    ("tried", "best"),
    [
        ({1e-3: 0.4, 3e-3: 0.5}, 3e-3),
        ({1e-3: 0.5, 3e-3: math.nan}, 1e-3),
        ({1e-3: math.nan, 3e-3: 0.1}, 3e-3),
        ({3e-3: math.nan, 1e-3: math.nan}, 1e-3),
    ],
)
def test_the_better_rate_is_that_of_the_higher_accuracy(tried, best):
    assert backbones.best_rate(tried) == best


def test_a_trial_that_diverges_is_not_a_number():
    found = backbones.run_trial(replace(TRIAL, recipe={"steps": 30, "lr": 1e30, "clip_norm": None}))
    assert all(math.isnan(value) for value in found.values())


def measured(chosen, size, **options):
    return list(backbones.costs(chosen, size, batch=2, repeats=2, **options))


def test_costs_are_counted_and_timed():
    chosen = {"a": TINY, "b": TINY}
    threads = torch.get_num_threads()
    small, large = (measured(chosen, "tiny", large=large) for large in (False, True))
    assert torch.get_num_threads() == threads
    assert [(name, repeat) for name, repeat, _ in small] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    (_, _, one), (_, _, other) = small[0], large[0]
    assert (one.pixels, other.pixels) == (32, 224)
    assert one.device == "cpu"
    assert one.parameters == measure.parameters(TINY.build("tiny"))
    assert one.flops == measure.flops(TINY.build("tiny"), torch.randn(1, 3, 32, 32))
    assert other.flops > one.flops
    assert 0 < other.images_per_second < one.images_per_second
    assert math.isnan(one.memory)


@pytest.mark.parametrize("name", ENTRIES)
def test_operations_counted_without_storage_are_those_of_a_run(name):
    with torch.device("meta"):
        model = ENTRIES[name].build("1M").eval()
        counted = measure.flops(model, torch.empty(1, 3, 32, 32))
    assert counted == measure.flops(ENTRIES[name].build("1M").eval(), torch.randn(1, 3, 32, 32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_operations_are_the_same_whatever_a_backbone_is_timed_on():
    options = {"large": False, "min_seconds": 0.01}
    chosen = {"vig": ENTRIES["vig"]}
    cpu, gpu = (measured(chosen, "1M", device=d, **options)[0][2] for d in ("cpu", "cuda"))
    assert cpu.flops == gpu.flops
    assert gpu.memory > 0


ROWS = [
    {"backbone": name, "size": "1M", "seed": seed, "accuracy": value}
    for name, values in {"vit": (0.5, 0.6), "swin": (0.7, 0.9), "svt": (None, 0.4)}.items()
    for seed, value in enumerate(values)
]


def costs_of(names, devices=("cpu",), memory=None):
    return [
        {"backbone": name, "size": "1M", "repeat": 0, "pixels": pixels, "device": device,
         "parameters": 1_000_000, "flops": 2e7 * pixels, "images_per_second": 12340.0 / pixels,
         "memory": memory if device == "cuda" else None}
        for name in names for pixels in (32, 224) for device in devices
    ]  # fmt: skip


def test_a_run_that_diverged_is_never_averaged_away():
    found = report.scores(ROWS, "1M")
    assert found["vit"][0] == pytest.approx(0.55)
    assert found["vit"][1] == pytest.approx(12.706 * 0.05, rel=1e-3)  # t of one degree of freedom
    assert found["vit"][2:] == (2, 0)
    assert math.isnan(found["svt"][0])
    assert found["svt"][2:] == (2, 1)
    assert report.scores(ROWS, "5M") == {}


def shown_table(monkeypatch, rows, costs):
    shown = []
    monkeypatch.setattr(report.display, "show_html", shown.append)
    report.table(rows, costs)
    return shown[0]


def test_the_table_has_the_best_first_and_says_what_diverged(monkeypatch):
    html = shown_table(monkeypatch, ROWS, costs_of(("svt", "vit", "swin")))
    assert html.index("swin") < html.index("vit") < html.index("svt")
    assert "80.0 ±" in html
    assert "1,000,000" in html
    assert "<td>1 of 2 diverged</td>" in html


def test_the_table_has_no_empty_columns_and_is_parted_when_wide(monkeypatch):
    one = shown_table(monkeypatch, [], costs_of(("vit", "swin")))
    heads = [f"{what}, {p}²" for p in (32, 224) for what in ("MFLOPs", "images/s, CPU")]
    expected = "".join(f'<th scope="col">{h}</th>' for h in ("backbone", "parameters", *heads))
    assert expected in one
    assert "–" not in one
    two = shown_table(monkeypatch, ROWS, costs_of(("vit", "swin"), ("cpu", "cuda"), 3e6))
    assert two.count("<table") == 2
    for part in two.split("<table")[1:]:
        head = part[: part.index("</thead>")]
        assert "accuracy [%]" in head
        assert "images/s, GPU" in head
        assert "MB" in head
        assert head.count('scope="col"') <= 1 + report.WIDEST


def figures(monkeypatch):
    shown = []
    monkeypatch.setattr(
        report.plotting, "show", lambda fig, alt, caption: shown.append((fig, caption))
    )
    return shown


def test_figures_name_each_backbone_once_and_no_name_lies_on_another(monkeypatch):
    shown = figures(monkeypatch)
    costs = costs_of(ENTRIES, ("cpu", "cuda"))
    rows = [
        {"backbone": n, "size": "1M", "seed": i, "accuracy": 0.7} for n in ENTRIES for i in (0, 1)
    ]
    report.cost_figure(costs, size="1M", device="cpu")
    report.figure(rows, costs, size="1M", pixels=32)
    assert [len(fig.axes) for fig, _ in shown] == [2, 3]  # both sides; work, CPU and GPU
    for fig, _ in shown:
        fig.draw_without_rendering()
        for ax in fig.axes:
            assert {t.get_text() for t in ax.texts} == {n.replace("_", " ") for n in ENTRIES}
            boxes = [Text.get_window_extent(t) for t in ax.texts]  # without the lines
            tops = sorted((box.y0, box.y1) for box in boxes)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(tops))


def test_without_times_accuracy_is_shown_against_work_alone(monkeypatch):
    shown = figures(monkeypatch)
    costs = [row | {"images_per_second": None} for row in costs_of(("vit", "swin"), ("cuda",))]
    rows = [{"backbone": n, "size": "1M", "seed": 0, "accuracy": 0.7} for n in ("vit", "swin")]
    report.figure(rows, costs, size="1M", pixels=32)
    ((fig, _),) = shown
    assert [ax.get_xlabel() for ax in fig.axes] == ["MFLOPs of a picture of 32² pixels"]


def test_a_figure_says_which_backbones_diverged(monkeypatch):
    shown = figures(monkeypatch)
    report.figure(ROWS, costs_of(("vit", "swin", "svt")), size="1M", pixels=32)
    ((fig, caption),) = shown
    assert [text.get_text() for text in fig.axes[0].texts] == ["vit", "swin"]
    assert caption.endswith("Not shown, because runs diverged: svt.")


def test_each_backbone_has_a_style_and_no_style_is_left_over():
    assert set(report.STYLES) == set(ENTRIES)
