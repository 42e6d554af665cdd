"""Attention sinks and outliers, on hand-worked cases."""

import pytest
import torch

from gatebook.measure import outliers


def test_uniform_attention_gives_the_first_token_its_share():
    weights = torch.ones(2, 3, 6, 6).tril()
    weights /= weights.sum(-1, keepdim=True)
    expected = sum(1 / (t + 1) for t in range(2, 6)) / 4
    assert outliers.first_token_share(weights, 2) == pytest.approx(expected)


def test_first_token_share_counts_the_chosen_queries_of_all_heads():
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 0, :, 0] = torch.tensor([1.0, 0.9, 0.5, 0.1])
    weights[0, 1, :, 0] = torch.tensor([1.0, 0.9, 0.3, 0.7])
    chosen = torch.tensor([[True, True, True, False]])
    assert outliers.first_token_share(weights, 2, chosen) == pytest.approx(0.4)
    assert outliers.first_token_share(weights, 2) == pytest.approx(0.4)
    assert outliers.first_token_share(weights, 3) == pytest.approx(0.4)
    assert outliers.first_token_share(weights, 1, chosen) == pytest.approx((0.9 + 0.4) / 2)


def test_no_query_is_an_error():
    with pytest.raises(ValueError, match="no query from position 4 on"):
        outliers.first_token_share(torch.ones(1, 1, 4, 4), 4)


def test_largest_activation_sees_both_signs():
    assert outliers.largest_activation(torch.tensor([[1.0, -7.0], [3.0, 2.0]])) == 7.0


def test_infinity_norm_is_the_mean_over_sequences():
    x = torch.tensor([[[1.0, -9.0], [2.0, 3.0]], [[0.0, 1.0], [-5.0, 2.0]]])
    assert outliers.infinity_norm(x) == 7.0


def test_kurtosis_of_a_hand_worked_sequence():
    """Numbers −1, 1, −1, 1: mean fourth power 1, unbiased variance 4/3."""
    x = torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]])
    assert outliers.kurtosis(x) == pytest.approx(1 / ((4 / 3) ** 2 + 1e-6))


def test_kurtosis_equals_scipy():
    from scipy import stats

    x = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)) ** 3
    n = 2000  # scipy's variance has n in its denominator
    expected = stats.kurtosis(x.flatten(1).double(), axis=1, fisher=False).mean()
    assert outliers.kurtosis(x) == pytest.approx(expected * ((n - 1) / n) ** 2, rel=1e-5)


def test_one_outlier_raises_both():
    x = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[:, 3, 7] = 100.0
    assert outliers.kurtosis(x) == pytest.approx(3, abs=0.3)
    assert outliers.kurtosis(loud) > 500
    assert outliers.infinity_norm(loud) == 100.0
