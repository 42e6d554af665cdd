"""CUDA graphs change the speed of training, not its numbers."""

import copy

import pytest
import torch
from torch import nn

from gatebook.training import Recipe, fit, graphs


def test_capture_refuses_the_cpu():
    with pytest.raises(ValueError, match="need a CUDA device"):
        graphs.capture(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_training_equals_plain_training():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).cuda()
    captured = copy.deepcopy(plain)
    graphs.capture(captured, torch.zeros(32, 8, device="cuda"))
    batches = [torch.randn(32, 8) for _ in range(5)]
    recipe = Recipe(steps=20, lr=1e-2)
    losses = [
        fit(model, batches, lambda m, x: m(x).square().mean(), recipe, device="cuda").loss
        for model in (plain, captured)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
