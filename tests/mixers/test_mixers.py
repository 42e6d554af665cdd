"""Every mixer of the book: one budget, the contract, the tasks, and a whole comparison."""

import importlib
import json
import math
import pkgutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gatebook import measure, mixers, models
from gatebook.data.recall import second_order_chain
from gatebook.data.synthetic import IGNORE
from gatebook.mixers import Sizes, compare, tasks

EXAMPLE = Path(__file__).with_name("example.py")
KNOWN = set(mixers.mixers()) | set(mixers.hybrids())
NAMES = [
    *mixers.mixers(),
    "running mean",
    "hgrn2 1:1",
    "gated_deltanet 1:1",
    "retnet 1:1, softmax first",
]
SMALL = Sizes(d_model=64, n_heads=4, n_layers=2)
LARGE = Sizes(d_model=256, n_heads=4, n_layers=4)
BOOK = {
    "softmax",
    "softmax_nope",
    "softmax_qk_norm",
    "gated_softmax",
    "sqa",
    "moh",
    "linear",
    "gla_fixed",
    "retnet",
    "gla",
    "hgrn",
    "hgrn2",
    "deltanet",
    "gated_deltanet",
    "mamba2",
    "gam",
    "lstm",
}


def built(name, sizes=SMALL, vocab_size=32):
    torch.manual_seed(0)
    return mixers.build(mixers.read(EXAMPLE)[name], vocab_size, sizes)


def tokens(length=23):
    return torch.randint(32, (2, length), generator=torch.Generator().manual_seed(1))


def test_every_file_with_a_table_is_named():
    found = set()
    for package in (mixers, models):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            found |= set(getattr(module, "MIXERS", {}))
    assert set(mixers.mixers()) == found >= BOOK


@pytest.mark.parametrize("conv_width", [0, 4])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_the_same_number_of_parameters(name, sizes, conv_width):
    sizes = Sizes(**(vars(sizes) | {"conv_width": conv_width}))
    with torch.device("meta"):
        count = measure.parameters(built(name, sizes))
    assert count == pytest.approx(mixers.budget(32, sizes), rel=0.02)


def test_the_budget_is_that_of_the_usual_transformer():
    assert measure.parameters(built("softmax")) == mixers.budget(32, SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_segments_with_carried_states_equal_the_whole(name):
    model = built(name).double()
    states, parts = None, []
    for start, end in ((0, 7), (7, 8), (8, 23)):
        part, states = model.continue_from(tokens()[:, start:end], states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens()), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_see_the_future(name):
    model, other = built(name).double(), tokens()
    other[:, 12:] = (other[:, 12:] + 1) % 32
    torch.testing.assert_close(model(other)[:, :12], model(tokens())[:, :12], atol=1e-12, rtol=0)
    assert (model(other)[:, 12:] - model(tokens())[:, 12:]).abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = built(name, Sizes(d_model=64, n_heads=4, n_layers=4))
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, parameter
        assert tensor.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("heads", [2, 3])
def test_few_heads_are_enough(heads):
    sizes = Sizes(d_model=32 * heads, n_heads=heads, n_layers=1)
    for name, make in mixers.mixers().items():
        model = mixers.build(make, 11, sizes)
        assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all(), name


def test_mixers_that_are_too_large_or_too_few_raise():
    with pytest.raises(ValueError, match="leave no room in a budget"):
        mixers.build(lambda s: [torch.nn.Linear(999, 999) for _ in range(2)], 32, SMALL)
    with pytest.raises(ValueError, match="2 blocks need as many mixers; got 1"):
        mixers.build(lambda s: [torch.nn.Linear(4, 4)], 32, SMALL)


def test_files_of_ones_own(tmp_path):
    assert set(mixers.read(EXAMPLE)) == KNOWN | {"running mean"}
    assert set(mixers.read("")) == KNOWN
    with pytest.raises(FileNotFoundError, match="no such file"):
        mixers.read(tmp_path / "nowhere.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="needs a table such as MIXERS"):
        mixers.read(tmp_path / "empty.py")
    (tmp_path / "taken.py").write_text('MIXERS = {"gla": None}\n')
    with pytest.raises(ValueError, match="two files define the mixer 'gla'; the second is taken"):
        mixers.read(tmp_path / "taken.py")
    with pytest.raises(ValueError, match="'gla'"):
        mixers.choose(["gal"], mixers.mixers())
    assert list(mixers.choose(["gla", "gam"], mixers.mixers())) == ["gla", "gam"]


def test_the_example_is_a_mean():
    mixer = built("running mean").blocks[0].mixer
    x = torch.randn(1, 5, 64)
    expected = mixer.out(torch.stack([mixer.value(x)[:, : t + 1].mean(1) for t in range(5)], 1))
    torch.testing.assert_close(mixer(x)[0], expected)
    assert len(EXAMPLE.read_text().splitlines()) <= 40


# --- tasks ---------------------------------------------------------------------------------------

RECIPE = {"schedule": "onecycle", "betas": (0.9, 0.95)}
SETTINGS = {
    "text": {"kind": "text", "corpus": "python_manual", "length": 32, "long": 128, "batch": 8}
    | {"test_bytes": 4096},
    "recall": {"kind": "recall", "length": 24, "pairs": [2, 6], "n_keys": 12, "n_values": 12}
    | {"batch": 32, "tests": 64},
    "copying": {"kind": "copying", "lengths": [8, 16], "n_symbols": 6, "batch": 8, "tests": 16},
    "parity": {"kind": "parity", "lengths": [32, 64], "batch": 8, "tests": 16},
    "s3": {"kind": "s3", "lengths": [8, 32], "batch": 8, "tests": 16},
    "chain": {"kind": "chain", "length": 24, "pairs": 4, "n_keys": 12, "n_values": 12, "batch": 8}
    | {"n_symbols": 5, "temperature": 0.5, "tests": 16},
    "mixed": {"kind": "mixed", "corpus": "python_manual", "length": 32, "pairs": [2, 6]}
    | {"n_keys": 12, "n_values": 12, "batch": 8, "tests": 16, "test_bytes": 2048},
}
for entry in SETTINGS.values():
    entry |= {"steps": 3, "sizes": vars(SMALL), "recipe": RECIPE}


def task(name, **changes):
    own = {k: v for k, v in SETTINGS[name].items() if k not in ("steps", "sizes", "recipe")}
    return tasks.make(**(own | changes))


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_follow_from_the_seed_and_differ_from_the_tests(name):
    made = task(name)
    first, again, other = (list(made.batches(seed, 3)) for seed in (0, 0, 1))
    assert len(first) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    for x, y in first + [batch for batches in made.tests.values() for batch in batches]:
        assert x.shape == y.shape
        assert 0 <= x.min() <= x.max() < made.vocab_size
        assert (y != IGNORE).any()
    seen = {tuple(row.tolist()) for x, _ in first for row in x}
    held_out = {tuple(row.tolist()) for b in made.tests.values() for x, _ in b for row in x}
    assert not seen & held_out


class Oracle(torch.nn.Module):
    """Knows the answers of some batches, and is wrong by one where it is told to."""

    def __init__(self, batches, vocab_size, wrong=lambda t, length: False):
        super().__init__()
        self.answers = {}
        for x, y in batches:  # what one condition asks may be ignored in another
            key = tuple(x[0].tolist())
            self.answers[key] = torch.maximum(y, self.answers.get(key, y))
        self.vocab_size, self.wrong = vocab_size, wrong

    def forward(self, x):
        y = self.answers[tuple(x[0].tolist())].clamp(min=0)
        places = torch.tensor([self.wrong(t, x.shape[1]) for t in range(x.shape[1])])
        return 50.0 * F.one_hot((y + places) % self.vocab_size, self.vocab_size)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_that_knows_the_answers_gets_full_marks(name):
    made = task(name)
    batches = [batch for part in made.tests.values() for batch in part]
    scores = made.score(Oracle(batches, made.vocab_size), "cpu", "fp32")
    assert scores.pop("loss") < 1e-9
    best = {n: pytest.approx(-made.floor.get(n, 0.0), abs=1e-9) for n in made.losses}
    assert scores == dict.fromkeys(made.tests, 1.0) | best


def test_what_a_chain_leaves_unknown_is_its_entropy():
    """The held-out loss above the floor is 0 for who knows the transition probabilities."""
    made = task("chain", tests=2000)
    fixed = torch.Generator().manual_seed(tasks.HELD_OUT)
    odds = second_order_chain(5, 0.5, fixed)

    class Knows(torch.nn.Module):
        def forward(self, x):
            logits = torch.zeros(*x.shape, made.vocab_size)
            for row in range(len(x)):
                last, before = None, None
                for t in range(8, 24):
                    if x[row, t] < 5:
                        before, last = last, x[row, t]
                        if before is not None:
                            logits[row, t, :5] = odds[before, last].log() + 100
            return logits

    x, y = made.tests["chain"][0]
    loss, _ = tasks.evaluate(Knows(), [(x[:100], y[:100])], "cpu", "fp32")
    assert loss == pytest.approx(made.floor["chain"], abs=0.05)
    assert made.floor["chain"] < 0.8 * math.log(5)


def test_late_scores_count_the_last_quarter_only():
    made = task("s3")
    batches = [batch for part in made.tests.values() for batch in part]
    early = Oracle(batches, 6, wrong=lambda t, length: t < 3 * length // 4)
    late = Oracle(batches, 6, wrong=lambda t, length: t >= 3 * length // 4)
    assert made.score(early, "cpu", "fp32")["s3 32"] == 1.0
    assert made.score(late, "cpu", "fp32")["s3 32"] == 0.0


def test_long_windows_of_text_count_their_last_quarter_only():
    made = task("text")
    for x, y in made.tests["text, long"]:
        assert x.shape[1] == 128
        assert (y[:, :96] == IGNORE).all()
        assert (y[:, 96:] != IGNORE).all()


def test_uniform_logits_have_the_loss_of_chance():
    class Uniform(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 6)

    assert task("s3").score(Uniform(), "cpu", "fp32")["loss"] == pytest.approx(math.log(6))


def test_unknown_task_raises():
    with pytest.raises(ValueError, match="recall"):
        tasks.make("recal")


# --- the comparison ------------------------------------------------------------------------------


def test_each_mixer_takes_the_rate_with_the_lowest_loss(monkeypatch):
    """With losses that are told instead of trained, so that the best rate is known."""
    best = {("gla", "s3"): 0.1, ("gla", "parity"): 0.3, ("gam", "s3"): 0.2, ("gam", "parity"): 0.1}
    seen = []

    def told(trial):
        seen.append(trial)
        distance = abs(trial.lr - best[trial.mixer, trial.task])
        return {"loss": float("inf") if distance > 0.15 else distance}

    monkeypatch.setattr(compare, "run_trial", told)
    settings = {name: SETTINGS[name] for name in ("s3", "parity")}
    found = compare.study(["gla", "gam"], settings, [0.1, 0.2, 0.3], [0, 1])
    finals = [trial for trial, _ in found if not trial.choosing]
    assert {(t.mixer, t.task): t.lr for t in finals} == best
    assert len(finals) == 8
    assert len(found) == len(seen) == 20
    assert {t.seed for t in finals} == {0, 1}
    assert {t.seed for t, _ in found if t.choosing} == {compare.CHOICE_SEED}


def test_a_run_that_diverges_is_not_chosen_and_does_not_stop_the_study(monkeypatch):
    def diverges(*args, **kwargs):
        raise FloatingPointError

    monkeypatch.setattr(compare, "fit", diverges)
    ((_, scores),) = compare.study(["gla"], {"s3": SETTINGS["s3"]}, [0.1], [0])
    assert scores["loss"] == float("inf")
    assert math.isnan(scores["s3 32"])


def test_two_workers_find_what_one_finds():
    """With a mixer from a file, in processes of their own."""
    settings = {name: SETTINGS[name] for name in ("recall", "s3")}
    args = (["softmax", "running mean"], settings, [1e-2, 3e-3], [0])
    alone = compare.study(*args, file=str(EXAMPLE))
    together = compare.study(*args, file=str(EXAMPLE), workers=2)
    assert alone == together


def test_scores_are_kept_and_an_error_loses_none(monkeypatch, tmp_path):
    """A study that breaks at its third trial goes on from there, and ends like one that did not."""
    log, seen = tmp_path / "runs" / "trials.jsonl", []

    def told(trial):
        seen.append((trial.lr, trial.seed))
        if len(seen) == 3:
            raise RuntimeError("out of memory")
        return {"loss": trial.lr, "s3 32": float("nan")}

    monkeypatch.setattr(compare, "run_trial", told)
    study = partial(compare.study, ["gla"], {"s3": SETTINGS["s3"]}, [0.2, 0.1], [0, 1], log=log)
    with pytest.raises(RuntimeError, match="memory"):
        study()
    log.write_text(log.read_text() + '\n{"trial": {"mixer": "gl')  # killed while writing
    found = study()
    chosen = compare.CHOICE_SEED
    assert seen == [(0.2, chosen), (0.1, chosen), (0.1, 0), (0.1, 0), (0.1, 1)]
    assert [scores["loss"] for _, scores in found] == [0.2, 0.1, 0.1, 0.1]
    study()
    assert len(seen) == 5


def test_an_error_in_a_process_is_said_and_the_other_scores_are_kept(tmp_path):
    """The mixers of the file are trained in processes; one of them cannot be."""
    file, log = tmp_path / "mine.py", tmp_path / "trials.jsonl"
    file.write_text(
        EXAMPLE.read_text()
        + '\nMIXERS["broken"] = lambda s: [torch.nn.Linear(1, 1) for _ in range(s.n_layers)]\n'
    )
    settings = {"s3": SETTINGS["s3"]}
    names = ["running mean", "broken", "softmax"]
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever torch raises)
        compare.study(names, settings, [0.01], [0], file=str(file), workers=3, log=log)
    assert "broken on s3" in caught.value.__notes__[0]
    kept = {json.loads(line)["trial"]["mixer"] for line in log.read_text().split("\n") if line}
    assert kept == {"running mean", "softmax"}


def test_training_recalls_what_was_written():
    """The whole way on a task that softmax attention learns in seconds, and a mean cannot."""
    settings = {"recall": SETTINGS["recall"] | {"steps": 250, "pairs": [4], "length": 12}}
    settings["recall"]["sizes"] = {"d_model": 32, "n_heads": 2, "n_layers": 2, "conv_width": 3}
    found = compare.study(["softmax", "running mean"], settings, [2e-2], [0], file=str(EXAMPLE))
    softmax, mean = (scores["4 pairs"] for _, scores in found)
    assert softmax > 0.95
    assert mean < 0.5


@pytest.mark.parametrize(
    ("name", "grows"), [("softmax", True), ("gla", False), ("deltanet", False), ("gam", False)]
)
def test_costs_count_the_state(name, grows):
    short, long = compare.costs(
        mixers.mixers()[name], SMALL, [8, 16], tokens=16, min_seconds=0.001, longest_training=8
    )
    assert (short.length, long.length) == (8, 16)
    assert short.train_us > 0 and math.isnan(long.train_us)  # noqa: PT018
    assert 0 < short.decode_ms < 1000
    assert long.state_bytes == short.state_bytes * (2 if grows else 1)
    if name == "softmax":
        assert short.state_bytes == 2 * 2 * 8 * 64 * 4  # blocks, k and v, tokens, channels, bytes
    if name == "gla":
        assert short.state_bytes == 2 * 4 * 8 * 16 * 4  # blocks, heads, K, V, bytes


def test_a_mixer_without_a_state_has_no_cost_of_decoding():
    class Forgetful(torch.nn.Linear):
        def forward(self, x, state=None):
            return super().forward(x), None

    (cost,) = compare.costs(
        lambda s: [Forgetful(64, 64) for _ in range(2)], SMALL, [8], tokens=8, min_seconds=0.001
    )
    assert cost.train_us > 0
    assert math.isnan(cost.decode_ms)
    assert math.isnan(cost.state_bytes)


def test_a_hybrid_needs_whole_groups():
    hybrid = mixers.hybrids()["gla 3:1"]
    with pytest.raises(ValueError, match="gla 3:1 needs a multiple of 4 blocks; got 2"):
        mixers.build(hybrid, 32, SMALL)


def test_a_file_may_hold_dataclasses(tmp_path):
    text = EXAMPLE.read_text().replace("import torch\n", "", 1)
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
    own = "\n@dataclass\nclass Sizes:\n    width: int = 3\n"
    (tmp_path / "mine.py").write_text(head + text.split('"""', 2)[2] + own)
    assert "running mean" in mixers.read(tmp_path / "mine.py")


def test_learning_rates_are_chosen_on_other_data_than_are_scored():
    for name in SETTINGS:
        scored, choosing = task(name), task(name, choosing=True)
        for condition, batches in scored.tests.items():
            (x, _), (z, _) = batches[0], choosing.tests[condition][0]
            assert not torch.equal(x, z) or SETTINGS[name].get("corpus") == "python_manual"


def test_the_loss_is_that_of_the_conditions_of_training():
    made = task("recall")
    assert made.trained == ("2 pairs", "6 pairs")
    batches = [batch for part in made.tests.values() for batch in part]
    worse = Oracle(batches, made.vocab_size, wrong=lambda t, length: t >= length // 2)
    scores = made.score(worse, "cpu", "fp32")
    losses = [tasks.evaluate(worse, made.tests[n], "cpu", "fp32")[0] for n in made.trained]
    assert scores["loss"] == pytest.approx(sum(losses) / 2)


def test_the_same_bytes_are_scored_after_a_long_and_a_short_context():
    made = task("text")
    for (x, y), (p, q) in zip(made.tests["text, long"], made.tests["text, short"], strict=True):
        assert p.shape == (2 * len(x), 32)  # 32 bytes of each row of 128, in two windows
        assert (q[:, :16] == IGNORE).all()
        assert torch.equal(q[:, 16:].reshape(len(x), -1), y[:, 96:])
        assert torch.equal(p[:, 17:], q[:, 16:-1])  # a target is the next input
