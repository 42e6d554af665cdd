"""The task of the mean or nothing: its targets by hand, its variance, and the bound it states."""

import pytest
import torch

from gatebook.data.suppression import mean_or_nothing, sum_of_the_informative


def test_targets_by_hand():
    x, y = mean_or_nothing(3, torch.Generator().manual_seed(0), side=2, channels=3)
    assert (x.shape, y.shape) == ((3, 2, 2, 4), (3, 2, 2, 3))
    for image, row, column in [(i, r, c) for i in range(3) for r in range(2) for c in range(2)]:
        mean = sum(x[image, r, c, :3] for r in range(2) for c in range(2)) / 4
        expected = torch.zeros(3) if x[image, row, column, 3] == 1 else 2 * mean
        assert torch.allclose(y[image, row, column], expected)
    assert set(x[..., 3].unique().tolist()) == {-1.0, 1.0}


def test_the_bound_without_flags():
    x, y = mean_or_nothing(4000, torch.Generator().manual_seed(1))
    mean = 8 * x[..., :4].mean((1, 2), keepdim=True)
    assert mean.square().mean().item() == pytest.approx(1, abs=0.05)
    error = (y - 0.5 * mean).square()
    assert 1 - (error.mean() / y.square().mean()).item() == pytest.approx(0.5, abs=0.01)
    assert error[x[..., 4] > 0].mean().item() == pytest.approx(0.25, abs=0.02)


def test_the_generator_decides():
    first, again, other = (mean_or_nothing(2, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_sums_by_hand():
    x, y = sum_of_the_informative(50, torch.Generator().manual_seed(0), side=2, channels=3)
    assert (x.shape, y.shape) == ((50, 2, 2, 4), (50, 2, 2, 3))
    for image in range(50):
        tokens = x[image].flatten(0, 1)
        total = sum((token[:3] for token in tokens if token[3] == -1), torch.zeros(3))
        torch.testing.assert_close(y[image], total.expand(2, 2, 3))  # divided by side / 2 = 1
    assert set(x[..., 3].unique().tolist()) == {-1.0, 1.0}


def test_the_bound_of_a_sum_over_all_tokens():
    x, y = sum_of_the_informative(8000, torch.Generator().manual_seed(1))
    assert (x[..., 4] < 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert y.square().mean().item() == pytest.approx(1, abs=0.05)
    everything = x[..., :4].sum((1, 2), keepdim=True) / 4
    left = (y - 0.25 * everything).square().mean() / y.square().mean()
    assert 1 - left.item() == pytest.approx(0.25, abs=0.02)
