"""Bidirectional gated linear attention (ViG): the PyTorch forms, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gatebook.kernels import bidirectional_gla, gla
from gatebook.kernels.gated_linear_attention.naive import parallel_bidirectional_gla

BACKENDS = ("naive", "parallel", "factorised", "chunked", "auto")


def inputs(length=29, batch=2, heads=2, keys=5, values=3, seed=0):
    """Random q, k, v and the gates of both directions."""
    gen = torch.Generator().manual_seed(seed)
    widths = (keys, keys, values, keys, keys)
    q, k, v, there, back = (
        torch.randn(batch, length, heads, width, generator=gen, dtype=torch.float64)
        for width in widths
    )
    return q, k, v, F.logsigmoid(there) / 2, F.logsigmoid(back) / 2


def with_gradients(form, xs):
    xs = [x.clone().requires_grad_() for x in xs]
    o = form(*xs)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    return (o.detach(), *torch.autograd.grad(o, xs, do))


def assert_same(left, right, atol=1e-10):
    for name, a, b in zip(("o", "dq", "dk", "dv", "dg→", "dg←"), left, right, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def apply_matrix(a, v):
    return torch.einsum("bhij,bjhv->bihv", a, v)


def test_both_directions_by_hand():
    one = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 3, 1, 1)
    there = torch.tensor([0.1, 0.5, 0.25], dtype=torch.float64).log().view(1, 3, 1, 1)
    back = torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64).log().view(1, 3, 1, 1)
    # forward 1, 10.5, 102.625; backward 100, 10 + 0.4 · 100 = 50, 1 + 0.2 · 50 = 11
    want = torch.tensor([(1 + 11) / 2, (10.5 + 50) / 2, (102.625 + 100) / 2], dtype=torch.float64)
    for backend in BACKENDS:
        o = bidirectional_gla(one, one, v, there, back, backend=backend)
        torch.testing.assert_close(o.flatten(), want)
    torch.testing.assert_close(
        parallel_bidirectional_gla(one, one, v, there, back, 1.0).flatten(), want
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 16, 29])
def test_outputs_and_gradients_are_those_of_the_parallel_form(backend, length):
    xs = inputs(length)
    want = with_gradients(lambda *x: parallel_bidirectional_gla(*x, 5**-0.5), xs)
    options = {"backend": backend, "chunk_size": 8, "subchunk": 4}
    assert_same(with_gradients(lambda *x: bidirectional_gla(*x, **options), xs), want)


def test_gradcheck():
    xs = [x.requires_grad_() for x in inputs(5, batch=1, heads=1, keys=2, values=2)]
    options = {"chunk_size": 4, "subchunk": 2}
    assert torch.autograd.gradcheck(lambda *x: bidirectional_gla(*x, **options), xs)


def test_gates_of_one_give_linear_attention_plus_the_self_term():
    q, k, v, there, _ = inputs()
    open_gate = torch.zeros_like(there)
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    a = (scores + torch.diag_embed(scores.diagonal(dim1=-2, dim2=-1))) / 2
    o = bidirectional_gla(q, k, v, open_gate, open_gate, scale=1.0)
    torch.testing.assert_close(o, apply_matrix(a, v), atol=1e-10, rtol=0)


def test_a_constant_gate_weighs_tokens_by_their_distance():
    q, k, v, there, _ = inputs()
    g = torch.full_like(there, 0.9).log()
    t = torch.arange(q.shape[1], dtype=torch.float64)
    decay = 0.9 ** (t[:, None] - t).abs() * (1 + torch.eye(len(t)))  # its own token counts twice
    a = torch.einsum("bihk,bjhk->bhij", q, k) * decay / 2
    o = bidirectional_gla(q, k, v, g, g, scale=1.0)
    torch.testing.assert_close(o, apply_matrix(a, v), atol=1e-10, rtol=0)


def flipped(*xs):
    return [x.flip(1) for x in xs]


@given(length=st.integers(2, 40), seed=st.integers(0, 99), chunk_size=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_one_gate_for_both_directions_is_symmetric_under_reversal(length, seed, chunk_size):
    q, k, v, g, _ = inputs(length, batch=1, seed=seed)
    o = bidirectional_gla(q, k, v, g, g, chunk_size=chunk_size)
    (again,) = flipped(bidirectional_gla(*flipped(q, k, v, g, g), chunk_size=chunk_size))
    torch.testing.assert_close(again, o, atol=1e-10, rtol=0)


@given(length=st.integers(2, 40), seed=st.integers(0, 99), chunk_size=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_a_gate_per_direction_breaks_the_symmetry_unless_they_are_swapped(length, seed, chunk_size):
    q, k, v, there, back = inputs(length, batch=1, seed=seed)
    o = bidirectional_gla(q, k, v, there, back, chunk_size=chunk_size)
    (kept,) = flipped(bidirectional_gla(*flipped(q, k, v, there, back), chunk_size=chunk_size))
    (swapped,) = flipped(bidirectional_gla(*flipped(q, k, v, back, there), chunk_size=chunk_size))
    assert (kept - o).abs().max() > 1e-6
    torch.testing.assert_close(swapped, o, atol=1e-10, rtol=0)


def test_the_last_token_sees_only_forward_and_the_first_only_backward():
    q, k, v, there, back = inputs()
    o = bidirectional_gla(q, k, v, there, back)
    own = (q * k).sum(-1, keepdim=True) * v * 5**-0.5
    forward, backward = gla(q, k, v, there)[0], gla(q, k, v, back, reverse=True)[0]
    torch.testing.assert_close(2 * o[:, -1] - own[:, -1], forward[:, -1], atol=1e-10, rtol=0)
    torch.testing.assert_close(2 * o[:, 0] - own[:, 0], backward[:, 0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_separate_calls(backend):
    lengths = (3, 0, 17, 1, 8)
    xs = inputs(sum(lengths), batch=1)
    offsets = torch.tensor([0, 3, 3, 20, 21, 29])
    packed = with_gradients(
        lambda *x: bidirectional_gla(*x, cu_seqlens=offsets, backend=backend), xs
    )

    def separate(*xs):
        parts = zip(*(x.split(lengths, 1) for x in xs), strict=True)
        whole = [parallel_bidirectional_gla(*p, 5**-0.5) for p in parts if p[0].shape[1]]
        return torch.cat(whole, 1)

    assert_same(packed, with_gradients(separate, xs))


@pytest.mark.parametrize("which", [3, 4])
def test_one_gate_per_head_equals_that_gate_in_every_channel(which):
    xs = list(inputs())
    xs[which] = xs[which][..., :1]
    narrow = bidirectional_gla(*xs)
    xs[which] = xs[which].expand_as(xs[1])
    torch.testing.assert_close(bidirectional_gla(*xs), narrow, atol=0, rtol=0)


def test_bfloat16_inputs_give_bfloat16_outputs():
    q, k, v, there, back = (x.float() for x in inputs(64, keys=16, values=16))
    exact = bidirectional_gla(q, k, v, there, back)
    o = bidirectional_gla(q.bfloat16(), k.bfloat16(), v.bfloat16(), there, back)
    assert o.dtype == torch.bfloat16
    assert (o.float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "one of auto, naive, parallel, factorised, chunked, triton; got"),
        ({"subchunk": 12}, "subchunk a power of two"),
        ({"g_backward": torch.zeros(2, 29, 2, 3, dtype=torch.float64)}, r"\[2, 29, 2, 5\], or"),
        ({"g_forward": torch.zeros(2, 29, 2, 5)}, "g float32 .float64 with float64 q."),
        ({"cu_seqlens": torch.tensor([0, 29])}, "B = 1; got B = 2"),
    ],
)
def test_impossible_requests_say_what_is_allowed(change, message):
    names = ("q", "k", "v", "g_forward", "g_backward")
    with pytest.raises(ValueError, match=message):
        bidirectional_gla(**dict(zip(names, inputs(), strict=True)) | change)
