"""Counting and timing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_alike_on_every_device(device, causal):
    q, k, v = torch.empty(3, 2, 4, 128, 16, device=device)  # (B, H, T, D)
    found = measure.flops(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
    assert found == 2 * 2 * 2 * 4 * 128 * 128 * 16  # two products of two a multiply-add


def test_a_linear_map_counts_two_for_a_multiply_add():
    assert measure.flops(nn.Linear(3, 5), torch.zeros(7, 3)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_latency_runs_both_passes_and_leaves_no_gradients(precision):
    seen = []

    class Counted(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            y.register_hook(lambda grad: seen.append(y.dtype))
            return y

    model, x = Counted(3, 5), torch.zeros(7, 3)
    ms = measure.training_latency(
        model, x, lambda model, x: model(x).sum(), precision=precision, min_seconds=0.001
    )
    assert 0 < ms < 1000
    assert seen
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(p.grad is None for p in model.parameters())
