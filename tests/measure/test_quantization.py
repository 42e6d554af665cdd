"""Simulated quantisation: grids by hand, running ranges, which tensors of a model are rounded."""

import copy

import pytest
import torch
from torch import nn

from gatebook.measure.quantization import (
    RunningRange,
    quantize_affine,
    quantize_model,
    quantize_symmetric,
)


def test_symmetric_grid_of_two_and_three_bits():
    x = torch.tensor([-1.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.0])
    assert quantize_symmetric(x, 2).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    expected = torch.tensor([-3, -2, -1, 0, 1, 2, 3]) / 3
    torch.testing.assert_close(quantize_symmetric(x, 3), expected)


def test_symmetric_error_is_at_most_half_a_step():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for bits in (4, 6, 8):
        step = x.abs().max() / (2 ** (bits - 1) - 1)
        rounded = quantize_symmetric(x, bits)
        assert (rounded - x).abs().max() <= step / 2 + 1e-6
        assert len(rounded.unique()) <= 2**bits


def test_zero_weights_stay_zero():
    assert quantize_symmetric(torch.zeros(3), 8).tolist() == [0, 0, 0]


def test_search_never_has_the_larger_error_and_clips_an_outlier():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x[0] = 30.0
    plain, searched = (quantize_symmetric(x, 4, search=search) for search in (False, True))
    assert (searched - x).square().sum() < (plain - x).square().sum()
    assert searched[0] < 30
    even = torch.tensor([-3.0, -2, -1, 0, 1, 2, 3])
    torch.testing.assert_close(quantize_symmetric(even, 3, search=True), even)


def test_affine_grid_by_hand():
    """Δ = 1, z = 1: the grid is −1, 0, 1, 2."""
    x = torch.tensor([-5.0, -1.0, -0.4, 0.6, 1.4, 2.0, 9.0])
    assert quantize_affine(x, -1.0, 2.0, 2).tolist() == [-1, -1, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("low", "high"), [(1.0, 3.0), (-3.0, -1.0), (-0.37, 2.1)])
def test_zero_is_on_the_affine_grid_whatever_the_range(low, high):
    assert quantize_affine(torch.zeros(1), low, high, 8).item() == 0
    ends = quantize_affine(torch.tensor([low, high]), low, high, 8)
    torch.testing.assert_close(ends, torch.tensor([low, high]), atol=0.012, rtol=0)


def test_affine_equals_pytorch():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    low, high = -1.97, 3.0
    step = (high - low) / 255
    expected = torch.fake_quantize_per_tensor_affine(x, step, round(-low / step), 0, 255)
    torch.testing.assert_close(quantize_affine(x, low, high, 8), expected, atol=1e-5, rtol=0)


def test_an_empty_range_gives_zeros():
    assert quantize_affine(torch.ones(2), 0.0, 0.0, 8).tolist() == [0, 0]


def test_running_range_has_momentum():
    found = RunningRange()
    found.update(torch.tensor([-1.0, 2.0]))
    assert (found.low, found.high) == (-1.0, 2.0)
    found.update(torch.tensor([-3.0, 0.0, float("-inf")]))
    assert found.low == pytest.approx(0.9 * -1 + 0.1 * -3)
    assert found.high == pytest.approx(0.9 * 2)


def test_percentile_leaves_out_the_extremes_on_both_sides():
    found = RunningRange(99.0)
    found.update(torch.arange(1000.0)[torch.randperm(1000)])
    assert (found.low, found.high) == (10.0, 989.0)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.LayerNorm(6), nn.ReLU())
        self.gate = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid())
        self.sum = nn.Identity()
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        y = self.body(x)
        return self.head(self.sum(x * self.gate(y)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


BATCHES = [torch.arange(9), torch.arange(9).flip(0)[:4]]


def test_a_model_is_its_own_arithmetic_with_rounded_tensors(model):
    """Every tensor rounded by hand, in the order of the forward pass."""
    found = quantize_model(model, BATCHES, bits=4, skip=("gate", "head"))
    hand = copy.deepcopy(model).eval()
    weights = (hand.embedding.weight, hand.body[0].weight, hand.body[2].weight)
    w_embedding, w_linear, w_norm = (quantize_symmetric(w.data, 4) for w in weights)
    seen = {}

    def values(x, point):
        def at(name, y):
            return point(name, y)

        x = at("embedding", w_embedding[x])
        y = at("linear", x @ w_linear.T + hand.body[0].bias)
        y = at("norm", nn.functional.layer_norm(y, (6,), w_norm, hand.body[2].bias))
        y = at("relu", y.relu())
        return at("sum", x * hand.gate(y)) @ hand.head.weight.T

    def watch(name, y):
        seen.setdefault(name, RunningRange()).update(y)
        return y

    def rounded(name, y):
        return quantize_affine(y, seen[name].low, seen[name].high, 4)

    with torch.no_grad():
        for batch in BATCHES:
            values(batch, watch)
        expected = values(BATCHES[0], rounded)
        torch.testing.assert_close(found(BATCHES[0]), expected, atol=1e-6, rtol=0)
        assert (expected - hand(BATCHES[0])).abs().max() > 1e-3


def test_the_model_itself_is_left_alone(model):
    before = copy.deepcopy(model.state_dict())
    found = quantize_model(model, BATCHES, bits=4, skip=("gate", "head"))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert model.training
    assert not found.training
    assert torch.equal(found.head.weight, model.embedding.weight)
    assert not torch.equal(found.head.weight, found.embedding.weight)


def test_more_bits_are_closer(model):
    model.eval()
    exact = model(BATCHES[0])
    errors = [
        (quantize_model(model, BATCHES[:1], bits=bits, skip=("gate", "head"))(BATCHES[0]) - exact)
        .norm()
        .item()
        for bits in (4, 6, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_options_reach_the_weights_and_the_ranges(model):
    with torch.no_grad():
        model.body[0].weight.normal_()
    plain = quantize_model(model, BATCHES, bits=4, skip=("head",))
    other = quantize_model(model, BATCHES, bits=4, skip=("head",), search_weights=True)
    expected = quantize_symmetric(model.body[0].weight.detach(), 4, search=True)
    assert torch.equal(other.body[0].weight, expected)
    assert not torch.equal(plain.body[0].weight, expected)
    clipped = quantize_model(model, BATCHES, bits=4, skip=("head",), percentile=60.0)
    x = BATCHES[0]
    assert clipped.embedding(x).abs().max() < 0.8 * plain.embedding(x).abs().max()


def test_calibration_without_batches_is_an_error(model):
    with pytest.raises(ValueError, match="calibration saw no output of embedding"):
        quantize_model(model, [], bits=8, skip=())


def test_one_bit_is_refused():
    for rounding in (quantize_symmetric, lambda x, bits: quantize_affine(x, 0.0, 1.0, bits)):
        with pytest.raises(ValueError, match="bits must be at least 2, got 1"):
            rounding(torch.ones(2), 1)
