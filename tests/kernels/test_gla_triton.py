"""The Triton form on the CPU, through Triton's interpreter, against the recurrence in float64."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatebook.kernels import bidirectional_gla, gla
from gatebook.kernels.gated_linear_attention import choose_backend
from gatebook.kernels.gated_linear_attention.naive import parallel_bidirectional_gla
from gatebook.models.gla import GLAConfig, GLALanguageModel
from kernels.gla_cases import (
    FEATURES,
    GATED,
    LENGTHS,
    Case,
    assert_right,
    bidirectional,
    bidirectional_reference,
    causal,
    double,
    everything,
    inputs,
    parametrise,
    reference,
)

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned_memory")

WIDTHS = [(16, 16), (32, 16), (24, 40), (64, 64), (5, 3), (1, 80), (130, 16)]
SEGMENTED = [  # long enough to be cut into segments
    Case(length=300),
    Case(length=300, reverse=True, initial_state=False, gate="by channel"),
    Case(lengths=(20, 290), gate_per_head=True),
    Case(length=600, dtype="bfloat16", heads=1),
]
STATELESS = {"initial_state": False, "final_state": False}
BOTH_WAYS = [
    *(Case(length=length, **STATELESS) for length in (1, 16, 33, 65)),
    *(Case(length=40, gate=gate, **STATELESS) for gate in (0.0, -20.0, "by channel", "by element")),
    Case(batch=2, length=40, gate_per_head=True, **STATELESS),
    Case(length=41, layout="inside NaN", **STATELESS),
    Case(length=41, layout="channels first", **STATELESS),
    Case(lengths=(33, 1, 64, 15), **STATELESS),
    Case(length=300, **STATELESS),
]


@parametrise(*LENGTHS, *GATED, *FEATURES, *SEGMENTED)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(case):
    xs = inputs(case)
    assert_right(causal(case, xs), reference(case, xs), xs)


@parametrise(*(Case(length=35, keys=k, values=v) for k, v in WIDTHS))
def test_any_key_and_value_width(case):
    xs = inputs(case)
    assert_right(causal(case, xs), reference(case, xs), xs)


@parametrise(Case(length=130), Case(length=17, keys=24, values=40, reverse=True), *GATED)
def test_bfloat16(case):
    case = replace(case, dtype="bfloat16")
    xs = inputs(case)
    found = causal(case, xs)
    assert {found[name].dtype for name in ("o", "dq", "dk", "dv")} == {torch.bfloat16}
    assert {found[name].dtype for name in ("final state", "dg")} == {torch.float32}
    assert_right(found, reference(case, xs), xs)


@parametrise(*BOTH_WAYS)
def test_bidirectional_is_the_mean_of_a_recurrence_from_each_end(case):
    xs = inputs(case, n_gates=2)
    assert_right(bidirectional(case, xs), bidirectional_reference(case, xs), xs)


@parametrise(Case(length=130, **STATELESS), Case(length=40, gate="by channel", **STATELESS))
def test_bidirectional_in_bfloat16(case):
    case = replace(case, dtype="bfloat16")
    xs = inputs(case, n_gates=2)
    assert_right(bidirectional(case, xs), bidirectional_reference(case, xs), xs)


def test_bidirectional_is_its_parallel_form():
    case = Case(length=50, **STATELESS)
    xs = inputs(case, n_gates=2)
    scale = case.keys**-0.5
    want = everything(lambda *x: (parallel_bidirectional_gla(*x[:5], scale), None), double(xs))
    assert_right(bidirectional(case, xs), want, xs)


@pytest.mark.parametrize("gate_per_head", [False, True])
def test_bidirectional_takes_a_gate_per_head_beside_a_gate_per_channel(gate_per_head):
    q, k, v, there, back = inputs(Case(**STATELESS), n_gates=2).tensors
    pair = (there[..., :1], back) if gate_per_head else (there, back[..., :1])
    found = bidirectional_gla(q, k, v, *pair, backend="triton")
    want = bidirectional_gla(q, k, v, *pair, backend="chunked")
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", range(5))
def test_any_single_gradient_is_the_one_among_all(wanted):
    case = Case(length=33)
    xs = inputs(case)
    names = ["dq", "dk", "dv", "dg", "d initial state"]
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((*xs.tensors, xs.state))]
    o, state = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True, backend="triton")
    loss = (o * xs.do).sum() + (state * xs.d_state).sum()
    (gradient,) = torch.autograd.grad(loss, leaves[wanted])
    torch.testing.assert_close(gradient, causal(case, xs)[names[wanted]], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate_per_head", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "inside NaN"])
def test_decoding_token_by_token_is_the_recurrence(dtype, gate_per_head, layout):
    case = Case(batch=3, length=7, keys=24, values=40, dtype=dtype, layout=layout)
    case = replace(case, gate_per_head=gate_per_head)
    xs = inputs(case)
    outputs, state = [], xs.state
    for t in range(case.length):
        token, before = (x[:, t : t + 1] for x in xs.tensors), state.clone()
        o, after = gla(*token, initial_state=state, output_final_state=True, backend="triton")
        assert torch.equal(state, before), "the state given was overwritten"
        outputs, state = [*outputs, o], after
    want = reference(case, xs)
    found = {"o": torch.cat(outputs, 1), "final state": state}
    assert_right(found, {name: want[name] for name in found}, xs)


def test_the_first_token_of_decoding_needs_no_state():
    q, k, v, g = inputs(Case(length=1)).tensors
    o, state = gla(q, k, v, g, output_final_state=True, backend="triton", scale=0.5)
    torch.testing.assert_close(state, k[:, 0, :, :, None] * v[:, 0, :, None])
    torch.testing.assert_close(o, 0.5 * (q * k).sum(-1, keepdim=True) * v, atol=1e-5, rtol=1e-5)
    assert gla(q, k, v, g, backend="triton")[1] is None


@pytest.mark.parametrize("gate", ["fixed", "scalar", "vector"])
def test_the_language_model_decodes_from_its_states(gate):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 32}
    model = GLALanguageModel(GLAConfig(**sizes, gate=gate, backend="triton"))
    tokens = torch.randint(11, (2, 12))
    with torch.no_grad():
        logits, states = model.continue_from(tokens[:, :8], None)
        for t in range(8, 12):
            one, states = model.continue_from(tokens[:, t : t + 1], states)
            logits = torch.cat([logits, one], 1)
    whole = model.continue_from(tokens, None)[0]
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


@given(length=st.integers(2, 70), cut=st.integers(0, 68), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_outputs_do_not_see_the_future(length, cut, seed):
    cut = min(cut, length - 2)
    case = Case(length=length, heads=1, initial_state=False)
    xs, others = (inputs(case, seed=s).tensors for s in (seed, seed + 100))
    pairs = zip(xs, others, strict=True)
    changed = [torch.cat([x[:, : cut + 1], y[:, cut + 1 :]], 1) for x, y in pairs]
    before, after = (gla(*x, backend="triton")[0][:, : cut + 1] for x in (xs, changed))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


@given(parts=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_splitting_anywhere_changes_nothing(parts, seed):
    xs = inputs(Case(length=sum(parts), heads=1), seed=seed)
    options = {"output_final_state": True, "backend": "triton"}
    whole, last = gla(*xs.tensors, initial_state=xs.state, **options)
    outputs, state = [], xs.state
    for piece in zip(*(x.split(parts, 1) for x in xs.tensors), strict=True):
        o, state = gla(*piece, initial_state=state, **options)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, atol=2e-5, rtol=0)
    torch.testing.assert_close(state, last, atol=2e-5, rtol=0)


@given(length=st.integers(1, 100), reverse=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_gates_of_one_give_plain_linear_attention(length, reverse, seed):
    q, k, v, g = inputs(Case(length=length, heads=1, gate=0.0), seed=seed).tensors
    o, _ = gla(q, k, v, g, scale=1.0, reverse=reverse, backend="triton")
    updates = torch.einsum("bthk,bthv->tbhkv", k.double(), v.double())
    states = updates.flip(0).cumsum(0).flip(0) if reverse else updates.cumsum(0)
    want = torch.einsum("bthk,tbhkv->bthv", q.double(), states)
    assert (o.double() - want).norm() <= 1e-6 * want.norm()


@given(length=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_swapping_the_gates_of_a_flipped_sequence_flips_the_outputs(length, seed):
    q, k, v, there, back = inputs(Case(length=length, heads=1), seed=seed, n_gates=2).tensors
    o = bidirectional_gla(q, k, v, there, back, backend="triton")
    flipped = (x.flip(1) for x in (q, k, v, back, there))
    again = bidirectional_gla(*flipped, backend="triton").flip(1)
    torch.testing.assert_close(again, o, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, r"bfloat16 or float32 .*got torch.float16"),
        ({"dtype": "float64"}, r"bfloat16 or float32 .*got torch.float64"),
        ({"keys": 257}, "at most 256 key and 512 value channels; got 257 and 32"),
        ({"values": 513}, "at most 256 key and 512 value channels; got 16 and 513"),
    ],
)
@pytest.mark.parametrize("form", [gla, bidirectional_gla])
def test_unsupported_tensors_raise_with_what_is_supported(form, change, message):
    case = Case(length=3, **change)
    xs = inputs(case, n_gates=2 if form is bidirectional_gla else 1).tensors
    if case.dtype == "float64":
        xs = [x.double() for x in xs]
    with pytest.raises(ValueError, match=message):
        form(*xs, backend="triton")


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "keys", "backend"),
    [
        (torch.float32, 16, "triton"),
        (torch.bfloat16, 256, "triton"),
        (torch.float64, 16, "chunked"),
        (torch.float16, 16, "chunked"),
        (torch.float32, 257, "chunked"),
    ],
)
def test_auto_takes_the_kernel_where_it_can(dtype, keys, backend):
    q = torch.zeros(1, 3, 1, keys, dtype=dtype)
    g = q.to(torch.promote_types(dtype, torch.float32))
    assert choose_backend("auto", *(x.as_subclass(OnGPU) for x in (q, q, g))) == backend
    assert choose_backend("auto", q, q, g) == "chunked"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("os.environ.pop('TRITON_INTERPRET', None)", "needs CUDA tensors"),
        ("sys.modules['triton'] = None", "needs the package triton"),
    ],
)
def test_without_triton_or_a_gpu_only_auto_works(setting, message):
    code = (
        f"import os, sys; {setting}; import torch; from gatebook.kernels import gla\n"
        "x = torch.ones(1, 3, 1, 2)\n"
        "gla(x, x, x, -x)\n"
        "try: gla(x, x, x, -x, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in done.stdout


def test_compiled_models_call_the_kernels_as_they_are():
    """`torch.compile` must not trace into the launches, which it would translate wrongly."""
    torch.manual_seed(0)
    config = GLAConfig(vocab_size=7, d_model=32, n_layers=1, n_heads=2, backend="triton")
    model, tokens = GLALanguageModel(config), torch.randint(7, (2, 20))
    expected = model(tokens)
    expected.sum().backward()
    gradient = model.blocks[0].mixer.key.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(tokens)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.blocks[0].mixer.key.weight.grad, gradient)
