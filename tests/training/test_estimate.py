"""The price of a run, counted before anything is allocated."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import models
from gatebook.training import Recipe, jobs
from gatebook.training.estimate import activation_bytes, estimate
from gatebook.training.jobs import Job
from gatebook.training.tasks import Task


def task(model, sample, *, precision="fp32", batch=4) -> Task:
    return Task(
        name="x",
        model=model,
        batches=list,
        loss=lambda m, x: m(x).square().mean(),
        sample=sample,
        recipes=(Recipe(steps=10, lr=1e-3, precision=precision),),
        batch=batch,
        processes=1,
        unit="tokens",
        per_sample=8,
        checkpoint_every=0,
    )


def linear(precision="fp32") -> Task:
    make = lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))  # noqa: E731
    return task(make, lambda n: torch.randn(n, 8, 16), precision=precision)


def test_flops_are_three_times_those_of_the_products_forward():
    assert jobs.flops_per_unit(linear()) == 3 * 2 * (16 * 32 + 32)


def test_kept_bytes_are_those_that_autograd_keeps():
    # input and ReLU output [4, 8, 16] and [4, 8, 32], output [4, 8, 1]; a gradient of the largest
    elements = 4 * 8 * (16 + 32 + 1 + 32)
    assert activation_bytes(linear())[0] == 4 * elements


def test_recomputing_blocks_keeps_less():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in "1234"]
            self.blocks = nn.ModuleList(nn.ModuleDict({"inner": part}) for part in parts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block["inner"](x)
            return x

    kept, _ = activation_bytes(task(Deep, lambda n: torch.randn(n, 8, 16)))
    size = {"vocab_size": 64, "d_model": 32, "n_layers": 4, "n_heads": 2}
    small = task(
        lambda: models.create("gla_340m", **size), lambda n: torch.randint(64, (n, 32)), batch=2
    )
    full, few = activation_bytes(small)
    assert 0 < few < full / 2
    assert kept > 0


@pytest.mark.parametrize(
    ("chapter", "arm", "unit", "units"),
    [
        ("gla", "vector", "tokens", 13351 * 16 * 16 * 2048),
        ("gla", "transformer", "tokens", 13351 * 16 * 16 * 2048),
        ("swin", "shifted", "images", 375_300 * 1024),
        ("mossformer", "joint", "seconds", 2_400_000 * 4),
        ("shvit", "single", "images", 187_500 * 2048),  # batch norms over the head
    ],
)
def test_a_full_run_has_its_price(chapter, arm, unit, units):
    found = estimate(Job(chapter=chapter, arm=arm), probe=False)
    assert (found.unit, found.units) == (unit, units)
    with torch.device("meta"):
        model = jobs.build(Job(chapter=chapter, arm=arm)).model()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.gpu_hours == pytest.approx(
        found.units
        * found.flops_per_unit
        / (0.3 * 1e12 * (67 if unit == "seconds" else 989))
        / 3600
    )
    assert "assumed" in found.source
    assert any("GPU-hours" in line for line in found.lines())


def test_more_gpus_share_the_time_and_the_states():
    one = estimate(Job(chapter="swin", arm="shifted"), probe=False)
    eight = estimate(Job(chapter="swin", arm="shifted"), gpus=8, probe=False)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    assert eight.units == one.units
    assert eight.memory["sharded"] < eight.memory["plain"] < one.memory["plain"]


def test_what_has_no_price_says_why():
    with pytest.raises(ValueError, match="do not share a global batch of 256 evenly"):
        estimate(Job(chapter="gla", arm="vector"), gpus=7, probe=False)
    with pytest.raises(ValueError, match="Potato"):
        estimate(Job(chapter="swin", arm="shifted"), gpu="Potato")
    with pytest.raises(ValueError, match="arm of gla at full 'vectr'"):
        estimate(Job(chapter="gla", arm="vectr"), probe=False)
    with pytest.raises(ValueError, match="cannot be trained as a job"):
        estimate(Job(chapter="gam", arm="full"), probe=False)


def test_the_loss_of_a_task_is_that_of_training():
    """What is priced is what is trained: the same task, with numbers."""
    built = jobs.build(Job(chapter="swin", arm="shifted", batch=2))
    assert built.batch == 2
    assert built.recipes[0].accumulate == 512
    model, (x, targets) = models.create("swin_t", depths=(1, 1, 1, 1)), built.sample(2)
    expected = F.cross_entropy(model.eval()(x), targets)
    assert built.loss(model, (x, targets)).item() == pytest.approx(expected.item())
