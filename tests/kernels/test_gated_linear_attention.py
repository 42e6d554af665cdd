"""Gated linear attention: every form against the recurrence, in float64 unless said otherwise."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gatebook.kernels import gla

NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "d initial state")
PLAIN = ("naive", "parallel", "factorised", "chunked")
BLOCKS = [(1, 1), (2, 2), (3, 16), (7, 2), (16, 4), (16, 16), (37, 1), (37, 8), (64, 16), (100, 32)]


def inputs(length=37, batch=2, heads=2, keys=5, values=3, seed=0, dtype=torch.float64, gate=2.0):
    """Random q, k, v, g and initial state; gates near exp(−0.8 / gate)."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    q, k = normal(batch, length, heads, keys), normal(batch, length, heads, keys)
    v = normal(batch, length, heads, values)
    g = F.logsigmoid(normal(batch, length, heads, keys)) / gate
    return q, k, v, g, normal(batch, heads, keys, values)


def everything(xs, **options):
    """Outputs, final state and the gradients of a random projection of both to all inputs."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    o, state = gla(*xs[:4], initial_state=xs[4], output_final_state=True, **options)
    gen = torch.Generator().manual_seed(1)
    do, ds = (torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (o, state))
    loss = (o * do.to(o.dtype)).sum() + (state * ds.to(state.dtype)).sum()
    return (o.detach(), state.detach(), *torch.autograd.grad(loss, xs))


def assert_same(left, right, atol):
    for name, a, b in zip(NAMES, left, right, strict=True):
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def recurrent():
    return everything(inputs(), backend="naive")


def test_recurrence_by_hand():
    q = torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1)
    k = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    v = torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1)
    g = torch.tensor([0.5, 0.5, 0.25]).log().view(1, 3, 1, 1)
    for backend in ("naive", "parallel", "chunked"):
        o, state = gla(q, k, v, g, output_final_state=True, backend=backend)
        # S = 1, then 1/2 + 2 = 2.5, then 2.5/4 + 6 = 6.625
        torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 2.5, 13.25]))
        assert state.item() == pytest.approx(6.625)


def test_recurrent_equals_parallel(recurrent):
    assert_same(everything(inputs(), backend="parallel"), recurrent, 1e-10)


@pytest.mark.parametrize(("chunk_size", "subchunk"), BLOCKS)
def test_recurrent_equals_chunkwise(recurrent, chunk_size, subchunk):
    out = everything(inputs(), backend="chunked", chunk_size=chunk_size, subchunk=subchunk)
    assert_same(out, recurrent, 1e-10)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65])
def test_any_length(length):
    xs = inputs(length)
    expected = everything(xs, backend="naive")
    assert_same(everything(xs, chunk_size=16, subchunk=4), expected, 1e-10)


@pytest.mark.parametrize(("keys", "values"), [(1, 8), (8, 1), (4, 4)])
def test_any_key_and_value_width(keys, values):
    xs = inputs(keys=keys, values=values)
    assert_same(everything(xs), everything(xs, backend="naive"), 1e-10)


def test_auto_is_the_chunked_form():
    xs = inputs()
    assert_same(everything(xs), everything(xs, backend="chunked"), 0)


@pytest.mark.parametrize("backend", ["naive", "parallel", "chunked"])
def test_split_sequence_with_carried_state_equals_whole(backend):
    q, k, v, g, s0 = inputs()
    whole, last = gla(q, k, v, g, initial_state=s0, output_final_state=True, backend=backend)
    halves, state = [], s0
    for part in (slice(0, 11), slice(11, 37)):
        args = (x[:, part] for x in (q, k, v, g))
        o, state = gla(*args, initial_state=state, output_final_state=True, backend=backend)
        halves.append(o)
    torch.testing.assert_close(torch.cat(halves, 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", PLAIN)
def test_reverse_is_flip_call_flip(backend):
    xs = inputs()
    options = {"backend": backend, "chunk_size": 8, "subchunk": 4}
    o, state, *grads, ds0 = everything(xs, reverse=True, **options)
    flipped = [x.flip(1) for x in xs[:4]]
    gen = torch.Generator().manual_seed(1)
    do, ds = (torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (o, state))
    leaves = [x.clone().requires_grad_() for x in (*flipped, xs[4])]
    want, last = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True, backend="naive")
    loss = (want * do.flip(1)).sum() + (last * ds).sum()
    *want_grads, want_ds0 = torch.autograd.grad(loss, leaves)
    want = (want.flip(1), last, *(x.flip(1) for x in want_grads), want_ds0)
    assert_same((o, state, *grads, ds0), [x.detach() for x in want], 1e-10)


def test_reverse_by_hand():
    ones = torch.ones(1, 3, 1, 1)
    v = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    g = torch.tensor([0.5, 0.25, 0.1]).log().view(1, 3, 1, 1)
    s0 = torch.full((1, 1, 1, 1), 1000.0)
    o, state = gla(ones, ones, v, g, initial_state=s0, output_final_state=True, reverse=True)
    # S = 0.1 · 1000 + 100 at the last token, 0.25 · 200 + 10 before it, 0.5 · 60 + 1 at the first
    torch.testing.assert_close(o.flatten(), torch.tensor([31.0, 60.0, 200.0]))
    assert state.item() == pytest.approx(31)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("offset_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", PLAIN)
def test_packed_sequences_equal_separate_calls(backend, offset_type, reverse):
    lengths = (5, 0, 17, 1, 14, 0)
    q, k, v, g, _ = inputs(sum(lengths), batch=1)
    s0 = torch.randn(len(lengths), 2, 5, 3, dtype=torch.float64)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=offset_type)
    options = {"backend": backend, "reverse": reverse, "chunk_size": 8, "subchunk": 4}
    packed = everything((q, k, v, g, s0), cu_seqlens=offsets, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g, s0)]
    outputs, states = [], []
    pieces = zip(*(x.split(lengths, 1) for x in leaves[:4]), leaves[4].split(1), strict=True)
    for *piece, state in pieces:
        if piece[0].shape[1]:
            walk = {"initial_state": state, "output_final_state": True, "reverse": reverse}
            o, state = gla(*piece, backend="naive", **walk)
            outputs.append(o)
        states.append(state)
    o, last = torch.cat(outputs, 1), torch.cat(states)
    gen = torch.Generator().manual_seed(1)
    do, ds = (torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (o, last))
    grads = torch.autograd.grad((o * do).sum() + (last * ds).sum(), leaves)
    assert_same(packed, (o.detach(), last.detach(), *grads), 1e-10)


def test_one_packed_sequence_is_a_batch_of_one():
    xs = inputs(batch=1)
    offsets = torch.tensor([0, 37])
    assert_same(everything(xs, cu_seqlens=offsets), everything(xs), 0)


def test_final_state_only_when_asked():
    assert gla(*inputs()[:4])[1] is None


@pytest.mark.parametrize("backend", ["naive", "parallel", "chunked"])
def test_gates_of_one_give_plain_linear_attention(backend):
    q, k, v, g, _ = inputs()
    o, _ = gla(q, k, v, torch.zeros_like(g), scale=1.0, backend=backend)
    scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores, v), atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", ["naive", "parallel", "chunked"])
def test_constant_gate_per_head_gives_retention_without_rotation(backend):
    q, k, v, _, _ = inputs(heads=3)
    gamma = 1 - 2.0 ** -torch.arange(5, 8, dtype=torch.float64)  # RetNet's decays, head by head
    g = gamma.log().view(1, 1, 3, 1).expand(*q.shape[:3], 1)
    o, _ = gla(q, k, v, g, scale=1.0, backend=backend)
    t = torch.arange(q.shape[1], dtype=torch.float64)
    decay = (gamma.view(3, 1, 1) ** (t[:, None] - t)).tril()
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * decay
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", scores, v), atol=1e-10, rtol=0)


def test_one_gate_per_head_equals_that_gate_in_every_channel():
    q, k, v, g, s0 = inputs()
    left = gla(q, k, v, g[..., :1], initial_state=s0)[0]
    right = gla(q, k, v, g[..., :1].expand_as(g).contiguous(), initial_state=s0)[0]
    torch.testing.assert_close(left, right, atol=0, rtol=0)


def test_gate_gradient_in_closed_form_equals_autograd():
    """The chunked form takes dg from q ⊙ dq − k ⊙ dk, the naive form from autograd."""
    xs = inputs(length=200, keys=8, values=8)
    closed, autograd = everything(xs)[5], everything(xs, backend="naive")[5]
    error = (closed - autograd).abs().max() / autograd.abs().max()
    assert error <= 1e-14


def test_first_gate_has_no_gradient_without_initial_state():
    q, k, v, g, _ = inputs()
    g.requires_grad_()
    o, _ = gla(q, k, v, g)
    (dg,) = torch.autograd.grad(o.square().sum(), g)
    assert dg[:, 0].abs().max() <= 1e-12 * dg.abs().max()
    assert dg[:, 1].abs().min() > 0


def test_first_gate_gradient_is_initial_state_times_its_gradient():
    xs = inputs()
    _, _, _, _, _, dg, ds0 = everything(xs)
    torch.testing.assert_close(dg[:, 0], (xs[4] * ds0).sum(-1), atol=1e-12, rtol=1e-12)


def test_gradcheck():
    xs = [x.requires_grad_() for x in inputs(length=6, batch=1, heads=1, keys=2, values=2)]

    def forward(q, k, v, g, s0):
        return gla(q, k, v, g, initial_state=s0, output_final_state=True, chunk_size=4, subchunk=2)

    assert torch.autograd.gradcheck(forward, xs)


def test_zero_logits_halve_the_memory_every_16_tokens():
    g = F.logsigmoid(torch.zeros(1, 17, 1, 1, dtype=torch.float64)) / 16
    assert g[0, 0, 0, 0].exp().item() == pytest.approx(0.5 ** (1 / 16), abs=1e-15)
    k = torch.zeros_like(g)
    k[:, 0] = 1.0
    o, _ = gla(torch.ones_like(k), k, torch.ones_like(k), g, scale=1.0)
    assert o[0, 16].item() / o[0, 0].item() == pytest.approx(0.5, abs=1e-14)


def test_factorised_form_overflows_past_2048_tokens():
    """1 / b_t = 2^(t/16) leaves float32 at t = 2048 = 16 · 128; the chunked form does not care."""
    assert math.log(torch.finfo(torch.float32).max) * 16 / math.log(2) == pytest.approx(2048)
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2100, 1, 4, generator=gen)
    g = torch.full_like(k, -math.log(2) / 16)
    broken = gla(q, k, v, g, backend="factorised")[0][0]
    good = gla(q, k, v, g)[0][0]
    exact = gla(*(x.double() for x in (q, k, v, g)), backend="naive")[0][0]
    first_bad = (~torch.isfinite(broken).flatten(1).all(1)).nonzero()[0].item()
    assert abs(first_bad - 2048) <= 16
    assert torch.isfinite(good).all()
    torch.testing.assert_close(good.double(), exact, atol=1e-5, rtol=1e-5)


def test_factorised_form_is_the_same_function_while_it_lasts(recurrent):
    assert_same(everything(inputs(), backend="factorised"), recurrent, 1e-10)


@pytest.mark.parametrize("backend", ["parallel", "chunked"])
@pytest.mark.parametrize(("log_gate", "rounding"), [(-20.0, 2e-5), (-80.0, 1e-4)])
def test_extreme_gates_stay_finite_and_right(backend, log_gate, rounding):
    """float32 loses digits as the gates add up within a chunk: 30 gates of -80 leave four."""
    q, k, v, g, s0 = inputs(length=70)
    g[:, 10:40, :, ::2] = log_gate
    expected = everything((q, k, v, g, s0), backend="naive")
    assert_same(everything((q, k, v, g, s0), backend=backend), expected, 1e-10)
    single = everything([x.float() for x in (q, k, v, g, s0)], backend=backend)
    for name, a, b in zip(NAMES, single, expected, strict=True):
        assert torch.isfinite(a).all(), name
        assert (a.double() - b).norm() <= rounding * b.norm(), name


def test_float32_error_against_float64_is_a_few_rounding_units():
    xs = inputs(length=512, keys=32, values=32, dtype=torch.float32)
    expected = everything([x.double() for x in xs], backend="naive")
    for name, a, b in zip(NAMES, everything(xs), expected, strict=True):
        assert (a.double() - b).norm() / b.norm() < 2e-6, name


def test_bfloat16_inputs_keep_float32_gates_and_states():
    q, k, v, g, s0 = inputs(length=128, keys=16, values=16, dtype=torch.float32)
    low = [x.bfloat16() for x in (q, k, v)]
    o, state = gla(*low, g, initial_state=s0, output_final_state=True)
    exact, _ = gla(*(x.float() for x in low), g, initial_state=s0)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (o.float() - exact).norm() / exact.norm() < 0.01


def test_autocast_does_not_lower_the_precision():
    q, k, v, g, _ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gla(q, k, v, g)[0]
    torch.testing.assert_close(inside, gla(q, k, v, g)[0], atol=0, rtol=0)


@given(
    length=st.integers(1, 40),
    cut=st.integers(0, 39),
    seed=st.integers(0, 99),
    chunk_size=st.integers(1, 50),
    log2_subchunk=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_outputs_do_not_see_the_future(length, cut, seed, chunk_size, log2_subchunk):
    options = {"chunk_size": chunk_size, "subchunk": 2**log2_subchunk}
    q, k, v, g, s0 = inputs(length, batch=1, heads=1, seed=seed)
    cut = min(cut, length - 1)
    before = gla(q, k, v, g, initial_state=s0, **options)[0][:, : cut + 1]
    other = inputs(length, batch=1, heads=1, seed=seed + 100)[:4]
    pairs = zip((q, k, v, g), other, strict=True)
    changed = [torch.cat([x[:, : cut + 1], y[:, cut + 1 :]], 1) for x, y in pairs]
    after = gla(*changed, initial_state=s0, **options)[0][:, : cut + 1]
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@given(
    length=st.integers(1, 80),
    seed=st.integers(0, 99),
    chunk_size=st.integers(1, 90),
    log2_subchunk=st.integers(0, 6),
    gate=st.sampled_from([0.05, 1.0, 16.0]),
)
@settings(max_examples=60, deadline=None)
def test_chunk_size_changes_nothing(length, seed, chunk_size, log2_subchunk, gate):
    xs = inputs(length, seed=seed, gate=gate)
    options = {"chunk_size": chunk_size, "subchunk": 2**log2_subchunk}
    scale = 1e-10 * (1 + 1 / gate)
    assert_same(everything(xs, **options), everything(xs), scale)


@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_splitting_anywhere_changes_nothing(parts, seed):
    q, k, v, g, s0 = inputs(sum(parts), seed=seed)
    whole, last = gla(q, k, v, g, initial_state=s0, output_final_state=True, chunk_size=8)
    outputs, state = [], s0
    for start, end in itertools.pairwise(itertools.accumulate(parts, initial=0)):
        piece = (x[:, start:end] for x in (q, k, v, g))
        o, state = gla(*piece, initial_state=state, output_final_state=True, chunk_size=8)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "naive, parallel, factorised, chunked, triton; got 'cuda'"),
        ({"chunk_size": 0}, "at least 1 and subchunk a power of two; got 0 and 16"),
        ({"subchunk": 12}, "subchunk a power of two; got 64 and 12"),
        ({"initial_state": torch.zeros(2, 2, 3, 5, dtype=torch.float64)}, r"\[2, 2, 5, 3\]"),
        ({"initial_state": torch.zeros(2, 2, 5, 3)}, "type torch.float64"),
        ({"g": torch.zeros(2, 37, 2, 5)}, "g float32 .float64 with float64 q."),
        ({"g": torch.zeros(2, 37, 2, 3, dtype=torch.float64)}, r"\[2, 37, 2, 5\], or"),
        ({"k": torch.zeros(2, 36, 2, 5, dtype=torch.float64)}, r"one shape \[B, T, H, K\]"),
        ({"v": torch.zeros(2, 37, 2, 3)}, "one floating type"),
    ],
)
def test_impossible_requests_say_what_is_allowed(change, message):
    q, k, v, g, _ = inputs()
    with pytest.raises(ValueError, match=message):
        gla(**({"q": q, "k": k, "v": v, "g": g} | change))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 20], r"start at 0, not decrease and end at T = 37; got \[0, 20\]"),
        ([1, 37], "start at 0"),
        ([0, 20, 10, 37], "not decrease"),
        ([0], "end at T = 37"),
        ([[0, 37]], r"offsets \[N \+ 1\] of type int32 or int64; got \[1, 2\]"),
        ([0.0, 37.0], "int32 or int64; got .* of torch.float32"),
    ],
)
def test_impossible_offsets_say_what_is_allowed(offsets, message):
    q, k, v, g, _ = inputs(batch=1)
    with pytest.raises(ValueError, match=message):
        gla(q, k, v, g, cu_seqlens=torch.tensor(offsets))


def test_packing_needs_a_batch_of_one_and_a_state_for_each_sequence():
    q, k, v, g, s0 = inputs()
    offsets = torch.tensor([0, 20, 30, 37])
    with pytest.raises(ValueError, match="needs B = 1; got B = 2"):
        gla(q, k, v, g, cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"shape \[3, 2, 5, 3\]"):
        gla(*(x[:1] for x in (q, k, v, g)), initial_state=s0, cu_seqlens=offsets)


def test_tensors_on_two_devices_raise():
    q, k, v, g, s0 = inputs()
    with pytest.raises(ValueError, match="one device; got cpu, cpu, meta, cpu"):
        gla(q, k, v.to("meta"), g)
    with pytest.raises(ValueError, match=r"device cpu; got .* and meta"):
        gla(q, k, v, g, initial_state=s0.to("meta"))


def test_no_tokens_raises():
    q, k, v, g, _ = inputs()
    with pytest.raises(ValueError, match="none of them empty"):
        gla(q[:, :0], k[:, :0], v[:, :0], g[:, :0])


@pytest.mark.parametrize("backend", ["naive", "parallel", "chunked"])
@pytest.mark.parametrize("closed", [-1e4, -1e9, -math.inf])
def test_after_a_closed_gate_nothing_is_left_of_the_tokens_before(backend, closed):
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 130, 2, 8, generator=gen)
    g = F.logsigmoid(torch.randn(1, 130, 2, 8, generator=gen)) / 16
    g[:, 70] = closed
    g.requires_grad_()
    o, state = gla(q, k, v, g, backend=backend, output_final_state=True)
    rest = [x[:, 70:].double() for x in (q, k, v, g)]
    alone, last = gla(*rest, backend="naive", output_final_state=True)
    for found, wanted in ((o[:, 70:], alone), (state, last)):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()
    (gradient,) = torch.autograd.grad(o.sum(), g)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 4, 2, 8, dtype=torch.int64)}, "floating type"),
        ({"v": torch.ones(1, 4, 2)}, "one shape"),
        ({"v": torch.ones(1, 4, 2, 0)}, "none of them empty"),
        ({"cu_seqlens": [0, 4]}, "tensor of offsets; got list"),
        ({"chunk_size": 1.5}, "whole numbers"),
    ],
)
def test_what_no_form_takes_is_refused(changes, message):
    x = torch.ones(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        gla(**({"q": x, "k": x, "v": x, "g": -x} | changes))
