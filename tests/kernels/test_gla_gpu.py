"""The Triton form on a GPU, against the chunkwise form in float64 on the same GPU.

    PYTHONPATH=lib:tests python -m pytest tests/kernels/test_gla_gpu.py -q -n 8

Most of the time is spent compiling, so that several processes help.
"""

import os
from dataclasses import replace

import pytest
import torch

from gatebook.kernels import bidirectional_gla, gla
from kernels.gla_cases import (
    FEATURES,
    GATES,
    Case,
    assert_right,
    bidirectional,
    bidirectional_reference,
    causal,
    chunked,
    inputs,
    parametrise,
    reference,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SIZES = {"heads": 4, "keys": 128, "values": 256}  # of the 340M model
STATELESS = {"initial_state": False, "final_state": False}
WIDTHS = [(5, 3), (16, 16), (24, 40), (32, 64), (64, 64), (64, 128), (100, 72), (128, 128)]
WIDTHS += [(128, 256), (256, 256), (256, 512)]
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 1000, 4096, 16_384)
RAGGED = (1000, 1, 0, 64, 2500, 63, 65, 4000, 499)
CASES = [
    *(Case(length=length, **SIZES) for length in LENGTHS),
    *(Case(length=300, keys=keys, values=values) for keys, values in WIDTHS),
    *(Case(length=500, keys=64, values=64, gate=gate) for gate in GATES),
    *(Case(length=4096, gate=gate, **SIZES) for gate in (0.0, "by channel", "by element")),
    *FEATURES,
    Case(lengths=RAGGED, **SIZES),
    Case(lengths=RAGGED, reverse=True, gate_per_head=True, **SIZES),
    Case(batch=64, length=200, **SIZES),
]
BOTH_WAYS = [
    *(Case(length=length, **SIZES, **STATELESS) for length in (1, 17, 196, 4096)),
    *(Case(length=300, keys=keys, values=values, **STATELESS) for keys, values in WIDTHS),
    *(Case(length=500, keys=32, values=64, gate=gate, **STATELESS) for gate in GATES),
    Case(batch=64, length=196, heads=3, keys=32, values=64, **STATELESS),
    Case(length=500, layout="inside NaN", **STATELESS),
    Case(length=500, layout="channels first", gate_per_head=True, **STATELESS),
    Case(lengths=RAGGED, **SIZES, **STATELESS),
]


@pytest.fixture(params=["float32", "tf32", "bfloat16"])
def kind(request):
    """The arithmetic; for the two in float32 torch's own switch decides."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def in_kind(case, kind):
    return replace(case, dtype="bfloat16" if kind == "bfloat16" else "float32")


@parametrise(*CASES)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(case, kind):
    case = in_kind(case, kind)
    xs = inputs(case, "cuda")
    assert_right(causal(case, xs), reference(case, xs, chunked), xs, kind)


@parametrise(*BOTH_WAYS)
def test_bidirectional_is_the_mean_of_a_recurrence_from_each_end(case, kind):
    case = in_kind(case, kind)
    xs = inputs(case, "cuda", n_gates=2)
    assert_right(bidirectional(case, xs), bidirectional_reference(case, xs, chunked), xs, kind)


@pytest.mark.parametrize(("keys", "values"), [(16, 16), (24, 40), (128, 256), (256, 512)])
@pytest.mark.parametrize("gate_per_head", [False, True])
def test_decoding_token_by_token_is_the_recurrence(keys, values, gate_per_head, kind):
    sizes = {"keys": keys, "values": values, "gate_per_head": gate_per_head}
    case = in_kind(Case(batch=64, length=20, heads=4, **sizes), kind)
    xs = inputs(case, "cuda")
    outputs, state = [], xs.state
    for t in range(case.length):
        token = (x[:, t : t + 1] for x in xs.tensors)
        o, state = gla(*token, initial_state=state, output_final_state=True, backend="triton")
        outputs.append(o)
    want = reference(case, xs, chunked)
    found = {"o": torch.cat(outputs, 1), "final state": state}
    assert_right(found, {name: want[name] for name in found}, xs, kind)


@parametrise(
    Case(batch=2, length=2048, **SIZES), Case(length=8192, **SIZES), Case(lengths=RAGGED, **SIZES)
)
def test_ten_repeats_are_bit_equal(case, kind):
    case = in_kind(case, kind)
    xs = inputs(case, "cuda")
    first = causal(case, xs)
    for _ in range(9):
        again = causal(case, xs)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@parametrise(Case(batch=2, length=2048, **SIZES, **STATELESS), Case(length=8192, **STATELESS))
def test_ten_repeats_of_the_bidirectional_form_are_bit_equal(case, kind):
    case = in_kind(case, kind)
    xs = inputs(case, "cuda", n_gates=2)
    first = bidirectional(case, xs)
    for _ in range(9):
        again = bidirectional(case, xs)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_auto_is_the_kernel_where_it_can_be():
    xs = inputs(Case(), "cuda").tensors
    assert torch.equal(gla(*xs)[0], gla(*xs, backend="triton")[0])


def test_auto_runs_where_the_kernel_cannot():
    xs = inputs(Case(), "cuda")
    o, _ = gla(*(x.double() for x in xs.tensors))
    want, _ = gla(*(x.double() for x in xs.tensors), backend="naive")
    torch.testing.assert_close(o, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_no_call_waits_for_the_device(packed):
    """Offsets on the CPU are read without waiting; the first call of a shape may wait."""
    xs = inputs(Case(length=500, **STATELESS), "cuda")
    leaves = [x.requires_grad_() for x in xs.tensors]
    offsets = torch.tensor([0, 100, 500]) if packed else None

    def forward_and_backward():
        o, _ = gla(*leaves, cu_seqlens=offsets)
        torch.autograd.grad(o, leaves, xs.do)

    forward_and_backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_does_not_lower_the_precision():
    xs = inputs(Case(length=100), "cuda").tensors
    with torch.autocast("cuda", torch.bfloat16):
        inside, _ = gla(*xs)
    assert torch.equal(inside, gla(*xs)[0])


@pytest.mark.parametrize("form", [gla, bidirectional_gla])
def test_more_than_two_to_the_31_elements(form):
    """The last of two packed sequences, whose elements lie beyond 32-bit offsets."""
    free, _ = torch.cuda.mem_get_info()
    if free < 70 * 2**30 or "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs 70 GiB of the device to itself: run it without -n")
    shape, last = (1, 2**20 + 100, 16), 100
    torch.manual_seed(0)
    sizes = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = (torch.randn(*shape, 128, **sizes) for _ in range(2))
    v, do = (torch.randn(*shape, 16, **sizes) for _ in range(2))
    gates = [-torch.rand(*shape, 1, device="cuda") / 16 for _ in range(1 + (form is not gla))]
    assert q.numel() > 2**31
    offsets = torch.tensor([0, shape[1] - last, shape[1]])

    def run(xs, do, cu_seqlens):
        leaves = [x.detach().requires_grad_() for x in xs]
        o = form(*leaves, cu_seqlens=cu_seqlens, backend="triton")
        o = o[0] if form is gla else o
        return [x[:, -last:] for x in (o, *torch.autograd.grad(o, leaves, do))]

    xs = (q, k, v, *gates)
    found = run(xs, do, offsets)
    want = run([x[:, -last:] for x in xs], do[:, -last:], None)
    for a, b in zip(found, want, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
