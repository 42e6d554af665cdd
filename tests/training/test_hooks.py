"""Averaged weights and adaptive clipping, by themselves and in a job."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from gatebook import models
from gatebook.training import Recipe, fit, jobs
from gatebook.training.hooks import Average, adaptive_clipping


class Counted:
    """Batches with a place."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self):
        while True:
            self.place += 1
            generator = torch.Generator().manual_seed(self.place)
            yield torch.randn(4, 3, generator=generator)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]

    def merge_states(self, states):
        return states[0]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def loss(model, batch):
    return (model(batch) - 1).square().mean()


def test_the_average_is_its_recurrence():
    """Against a loop over the weights after each step, of the same run without an average."""
    decay, followed = 0.7, model()

    def state(of):
        return [t.detach() for t in of.state_dict().values() if t.is_floating_point()]

    expected = [t.clone() for t in state(followed)]
    average = Average(Counted(), followed, decay)
    with average.following():
        fit(followed, average, loss, Recipe(steps=6, lr=0.1))
    plain, batches = model(), Counted()
    for steps in range(1, 7):
        plain, batches = model(), Counted()
        fit(plain, batches, loss, Recipe(steps=6, lr=0.1, schedule="cosine") if steps == 6 else
            Recipe(steps=6, lr=0.1), progress=lambda items, _words, n=steps: items[:n])  # fmt: skip
        expected = [
            decay * e + (1 - decay) * p for e, p in zip(expected, state(plain), strict=True)
        ]
    for own, other in zip(followed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)  # training does not notice
    average.apply()
    for t, e in zip(state(followed), expected, strict=True):  # statistics of the norm are in it
        torch.testing.assert_close(t, e)
    assert followed[1].num_batches_tracked == 6


def test_the_hook_goes_when_the_run_is_over():
    average = Average(Counted(), net := model(), 0.5)
    with average.following():
        fit(net, average, loss, Recipe(steps=1, lr=0.1))
    before = [w.clone() for w in average.weights]
    fit(net, average, loss, Recipe(steps=1, lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, average.weights, strict=True))


def test_a_run_that_goes_on_has_the_same_average(tmp_path: Path):
    recipe = Recipe(steps=8, lr=0.1)

    def run(folder, steps):
        average = Average(Counted(), net := model(), 0.9)
        with average.following():
            fit(
                net,
                average,
                loss,
                recipe,
                checkpoint_dir=tmp_path / folder,
                checkpoint_every=4,
                resume=True,
                progress=lambda items, _words: items[: steps - items.start],
            )
        return average.weights

    whole = run("a", 8)
    run("b", 5)  # the fifth step is lost
    resumed = run("b", 8)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_states_of_several_processes_are_merged():
    average = Average(Counted(), model(), 0.9)
    state = average.state_dict()
    merged = average.merge_states([state, state])
    average.load_state_dict(merged)
    assert merged["batches"] == {"place": 0}


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decays_and_batches_that_cannot_be(decay):
    with pytest.raises(ValueError, match="decay of an average"):
        Average(Counted(), model(), decay)
    with pytest.raises(ValueError, match="state_dict"):
        Average([1], model(), 0.5)


def test_adaptive_clipping_shortens_long_gradients_unit_by_unit():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = torch.tensor([3.0, 0, 4.0]), 0.0
        layer.bias.fill_(1.0)
    gradients = torch.tensor([[0.0, 0.2, 0.0], [0.0, 0.0, 5.0]])
    layer.weight.grad, layer.bias.grad = gradients.clone(), torch.tensor([0.0, 3.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with adaptive_clipping(layer, 0.1):
        optimizer.step()
    expected = torch.tensor([[0.0, 0.2, 0.0], [0.0, 0.0, 1e-4]])  # 0.2 < 0.1 * 5; 0.1 * 0.001
    torch.testing.assert_close(layer.weight.grad, expected)
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.0, 0.1 * 2**0.5]))
    layer.weight.grad = gradients.clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad, gradients)
    with pytest.raises(ValueError, match="positive"), adaptive_clipping(layer, 0.0):
        pass


@pytest.fixture
def averaged(job, tmp_path, monkeypatch):
    """The toy's job in a book whose full scale wants an average and clipping."""
    fields = yaml.safe_load(Path("chapters/toy.yml").read_text())
    fields["scales"]["full"]["settings"] |= {"ema": 0.9, "adaptive_clip": 0.02}
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters/toy.yml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(tmp_path)
    return job


def test_a_job_ends_with_the_average_also_when_it_was_stopped(averaged, tmp_path):
    jobs.train(replace(averaged, folder="whole"))
    asked = iter([False] * 12 + [True])
    stopped = replace(averaged, folder="stopped")
    assert jobs.train(stopped, stop=lambda: next(asked)).stopped
    jobs.train(stopped)
    jobs.train(stopped)  # it had ended
    one, two = (models.load(tmp_path / name / "weights") for name in ("whole", "stopped"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_differs_from_the_last_weights(averaged, job, monkeypatch, tmp_path):
    jobs.train(replace(averaged, folder="averaged", max_steps=5))
    seen = []
    monkeypatch.setattr(Average, "apply", lambda self: seen.append(self.weights))
    jobs.train(replace(averaged, folder="last", max_steps=5))
    one, two = (models.load(tmp_path / name / "weights") for name in ("averaged", "last"))
    assert not torch.equal(one.head.weight, two.head.weight)
    for a, b in zip(one.parameters(), seen[0], strict=True):
        assert torch.equal(a, b)


def test_an_average_needs_whole_weights(averaged):
    with pytest.raises(ValueError, match="ddp"):
        jobs.build(replace(averaged, strategy="fsdp"))
