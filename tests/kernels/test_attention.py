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
    with pytest.raises(ValueError, match="got 7 keys, 4 queries and past=0"):
        attention(q, k, k, causal=True)


@pytest.mark.parametrize("attention", [softmax_attention, naive_softmax_attention])
def test_heads_that_do_not_divide_raise(attention):
    with pytest.raises(ValueError, match="2 key heads do not divide 3 query heads"):
        attention(torch.randn(1, 4, 3, 8), *torch.randn(2, 1, 4, 2, 8))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_queries_after_others_see_what_they_would_in_one_call(length, groups):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, 12, 4, 8, generator=gen, dtype=torch.float64)
    k, v = torch.randn(2, 2, 12, groups, 8, generator=gen, dtype=torch.float64)
    whole = naive_softmax_attention(q, k, v, causal=True)
    late = softmax_attention(q[:, -length:], k, v, causal=True, past=12 - length)
    torch.testing.assert_close(late, whole[:, -length:])
    torch.testing.assert_close(softmax_attention(q, k, v, causal=True), whole)


def test_groups_are_contiguous():
    """Query heads 0 and 1 read key head 0, as if it stood there twice."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 4, 8, generator=gen)
    k, v = torch.randn(2, 1, 6, 2, 8, generator=gen)
    written_out = softmax_attention(q, k[:, :, [0, 0, 1, 1]], v[:, :, [0, 0, 1, 1]], causal=True)
    torch.testing.assert_close(softmax_attention(q, k, v, causal=True), written_out)


def windowed_by_hand(q, k, v, window):
    """Query by query, over the keys of its window alone."""
    rows = []
    for t in range(q.shape[1]):
        keys = slice(max(0, t - window + 1), t + 1)
        rows.append(naive_softmax_attention(q[:, t : t + 1], k[:, keys], v[:, keys]))
    return torch.cat(rows, 1)


@pytest.mark.parametrize("attention", [softmax_attention, naive_softmax_attention])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 29, 30, 40])
def test_window_sees_the_last_keys_alone(attention, groups, window):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, 30, 4, 8, generator=gen, dtype=torch.float64)
    k = torch.randn(2, 30, groups, 8, generator=gen, dtype=torch.float64)
    v = torch.randn(2, 30, groups, 5, generator=gen, dtype=torch.float64)
    found = attention(q, k, v, causal=True, window=window)
    torch.testing.assert_close(found, windowed_by_hand(q, k, v, window))


@pytest.mark.parametrize("attention", [softmax_attention, naive_softmax_attention])
@pytest.mark.parametrize(("length", "kept"), [(1, 4), (1, 2), (3, 4), (12, 4)])
def test_window_of_queries_after_others(attention, length, kept):
    """The last four keys are all that a window of five needs of what was; with fewer, fewer."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, kept + length, 2, 8, generator=gen, dtype=torch.float64)
    found = attention(q[:, kept:], k, v, causal=True, past=kept, window=5)
    torch.testing.assert_close(found, windowed_by_hand(q, k, v, 5)[:, kept:])


def test_window_has_the_gradients_of_the_equation():
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 23, 2, 4, generator=gen, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weights = torch.randn(1, 23, 2, 4, generator=gen, dtype=torch.float64)
    fast, slow = (
        torch.autograd.grad((f(*inputs, causal=True, window=3) * weights).sum(), inputs)
        for f in (softmax_attention, naive_softmax_attention)
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", [softmax_attention, naive_softmax_attention])
def test_impossible_windows_raise(attention):
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="got 3 and False"):
        attention(q, q, q, window=3)
    with pytest.raises(ValueError, match="got -1 and True"):
        attention(q, q, q, causal=True, window=-1)
