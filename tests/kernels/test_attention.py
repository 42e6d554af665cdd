"""Softmax attention: torch's kernel against the equation."""

import pytest
import torch

from gatebook.kernels import naive_softmax_attention, softmax_attention


@pytest.mark.parametrize("causal", [False, True])
def test_fused_equals_naive(causal):
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 33, 3, 8, generator=gen, dtype=torch.float64)
    v = torch.randn(2, 33, 3, 5, generator=gen, dtype=torch.float64)
    fused = softmax_attention(q, k, v, causal=causal)
    torch.testing.assert_close(fused, naive_softmax_attention(q, k, v, causal=causal))
    assert fused.shape == (2, 33, 3, 5)


def test_hand_worked_case():
    q = torch.tensor([[[[0.0]], [[1.0]]]])  # (B, T, H, K) with T = 2
    k = torch.tensor([[[[0.0]], [[1.0]]]])
    v = torch.tensor([[[[1.0]], [[3.0]]]])
    e = torch.e
    second = (1 + 3 * e) / (1 + e)
    out = naive_softmax_attention(q, k, v, causal=True, scale=1.0).flatten()
    torch.testing.assert_close(out, torch.tensor([1.0, second]))


def test_fewer_keys_than_queries_without_mask():
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 7, 1, 8), torch.randn(1, 7, 1, 8)
    torch.testing.assert_close(softmax_attention(q, k, v), naive_softmax_attention(q, k, v))


@pytest.mark.parametrize("attention", [softmax_attention, naive_softmax_attention])
def test_causal_with_unequal_lengths_raises(attention):
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 7, 1, 8)
    with pytest.raises(ValueError, match="as many keys as queries; got 7 and 4"):
        attention(q, k, k, causal=True)
