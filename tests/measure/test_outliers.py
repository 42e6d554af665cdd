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
