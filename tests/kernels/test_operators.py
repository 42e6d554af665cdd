"""Every recurrence of the book by one suite: fast form against the naive one, in float64 and below.

A variant is a map from random arrays to an operator's arguments, so that RetNet, HGRN2, Mamba-2
and the others are tested with the keys and gates that they really use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatebook.kernels import delta_rule, gla, linear_scan

NAMES = ("output", "last state", "dq", "dk", "dv", "dgate", "dbeta", "dstate")


@dataclass(frozen=True)
class Variant:
    """One recurrence: `run(q, k, v, gate, beta, state, **options) -> (output, state)`."""

    run: Callable[..., tuple[Tensor, Tensor]]
    fast: str  # name of its fast form
    unused: tuple[str, ...] = ()  # inputs without a gradient


def logsigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))


def with_gates(make):
    """A variant of `gla` whose keys and gates are a function of the keys and the raw gates."""

    def run(q, k, v, gate, beta, state, **options):
        k, g = make(k, gate)
        options |= {"initial_state": state, "output_final_state": True}
        return gla(q, k.to(q.dtype), v, g, **options)

    return run


def delta(gated):
    def run(q, k, v, gate, beta, state, **options):
        g = logsigmoid(gate[..., 0]) / 2 if gated else None
        q, k = (F.normalize(x, dim=-1) for x in (q, k))
        beta = logsigmoid(beta).exp()
        options |= {"initial_state": state, "output_final_state": True}
        return delta_rule(q, k, v, beta, g, **options)

    return run


def hgrn(q, k, v, gate, beta, state, **options):
    g = logsigmoid(gate).flatten(2)
    x = -torch.expm1(g) * k.to(g.dtype).flatten(2)
    h, last = linear_scan(x, g, initial_state=state[..., 0].flatten(1), **options)
    return h.unflatten(-1, gate.shape[2:]).to(k.dtype), last.unflatten(-1, state.shape[1:3])[
        ..., None
    ]


def retnet(k, gate):
    heads = torch.arange(k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
    return k, torch.log1p(-(2.0 ** (-5 - heads))).view(1, 1, -1, 1).expand(*k.shape[:3], 1)


def mamba2(k, gate):
    """Scalar gate and step size dt from one number: g = −dt, and the key is scaled by dt."""
    dt = F.softplus(gate[..., :1])
    return dt * k, -dt


VARIANTS = {
    "linear attention": Variant(
        with_gates(lambda k, gate: (k, 0 * gate[..., :1])), "chunked", ("dgate", "dbeta")
    ),
    "retnet": Variant(with_gates(retnet), "chunked", ("dgate", "dbeta")),
    "scalar gate": Variant(
        with_gates(lambda k, gate: (k, logsigmoid(gate[..., :1]))), "chunked", ("dbeta",)
    ),
    "gla": Variant(with_gates(lambda k, gate: (k, logsigmoid(gate) / 16)), "chunked", ("dbeta",)),
    "hgrn2": Variant(
        with_gates(lambda k, gate: (-torch.expm1(logsigmoid(gate)), logsigmoid(gate))),
        "chunked",
        ("dk", "dbeta"),
    ),
    "mamba-2": Variant(with_gates(mamba2), "chunked", ("dbeta",)),
    "hgrn": Variant(hgrn, "doubling", ("dq", "dv", "dbeta")),
    "deltanet": Variant(delta(gated=False), "chunked", ("dgate",)),
    "gated deltanet": Variant(delta(gated=True), "chunked"),
}


def inputs(length=37, batch=2, heads=2, keys=5, values=3, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(kind)

    q, k, v = (normal(batch, length, heads, n) for n in (keys, keys, values))
    gate = normal(batch, length, heads, keys, kind=wide)
    beta = normal(batch, length, heads, kind=wide)
    return q, k, v, gate, beta, normal(batch, heads, keys, values, kind=wide)


def everything(variant, xs, **options):
    """Output, last state and the gradients of a random projection of both."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    o, state = variant.run(*xs, **options)
    gen = torch.Generator().manual_seed(1)
    do, ds = (torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (o, state))
    loss = (o * do.to(o.dtype)).sum() + (state * ds.to(state.dtype)).sum()
    return (o.detach(), state.detach(), *torch.autograd.grad(loss, xs, allow_unused=True))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def assert_same(variant, left, right, atol):
    for name, a, b in zip(NAMES, left, right, strict=True):
        if name in variant.unused:
            assert a is None or not a.any(), name
            continue
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 37, 64, 65])
def test_fast_equals_naive(variant, length):
    xs = inputs(length)
    naive = everything(variant, xs, backend="naive")
    assert_same(variant, everything(variant, xs, backend=variant.fast), naive, 1e-10)
    assert_same(variant, everything(variant, xs), naive, 1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 37, 100])
def test_any_chunk_size(variant, chunk_size):
    if variant.fast != "chunked":
        pytest.skip("has no chunks")
    naive = everything(variant, inputs(), backend="naive")
    fast = everything(variant, inputs(), backend="chunked", chunk_size=chunk_size)
    assert_same(variant, fast, naive, 1e-10)


def test_a_sequence_may_be_cut_anywhere(variant):
    *xs, state = inputs(23)
    whole, last = variant.run(*xs, state)
    for cut in (1, 7, 16, 22):
        first, middle = variant.run(*(x[:, :cut] for x in xs), state)
        second, end = variant.run(*(x[:, cut:] for x in xs), middle)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(end, last, atol=1e-12, rtol=0)


def test_nothing_depends_on_later_tokens(variant):
    *xs, state = inputs(23)
    before, _ = variant.run(*xs, state)
    changed = [torch.cat([x[:, :11], x[:, 11:] + 1], 1) for x in xs]
    after, _ = variant.run(*changed, state)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().amax((0, 2, 3)).min() > 1e-3


def test_gradients_are_those_of_finite_differences(variant):
    xs = [x.requires_grad_() for x in inputs(5, batch=1, heads=1, keys=3, values=2)]
    if variant.fast == "doubling":
        xs[-1] = xs[-1].detach()  # only one column of it is the state
    assert torch.autograd.gradcheck(
        lambda *xs: variant.run(*xs, backend=variant.fast), xs, check_undefined_grad=False
    )


LIMITS = {torch.float32: 2e-6, torch.bfloat16: 7e-3}  # the keys of DeltaNet are rounded once more


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_error_of_narrow_types(variant, dtype):
    """Against the naive form in float64 on the same rounded inputs, relative to the RMS."""
    xs = inputs(200, keys=16, values=16, dtype=dtype)
    exact = everything(variant, [x.double() for x in xs], backend="naive")
    found = everything(variant, xs)
    for name, a, b in zip(NAMES, found, exact, strict=True):
        if name not in variant.unused:
            error = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()
            assert error < LIMITS[dtype], (name, error.item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["retnet", "gla", "hgrn2", "deltanet", "gated deltanet"])
def test_agrees_with_flash_linear_attention(name):
    """fla's kernels and ours on the same inputs, both in bfloat16, one no further from float64
    than three times the other."""
    pytest.importorskip("fla")
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla

    xs = [x.cuda() for x in inputs(300, heads=4, keys=64, values=64, dtype=torch.bfloat16)]
    q, k, v, gate, beta, state = xs
    exact, _ = VARIANTS[name].run(*(x.double() for x in xs), backend="naive")
    ours, _ = VARIANTS[name].run(*xs)
    options = {"scale": 64**-0.5, "initial_state": state, "output_final_state": True}
    if "delta" in name:
        q, k = (F.normalize(x, dim=-1) for x in (q, k))
        strength = logsigmoid(beta).exp()
        if name == "deltanet":
            theirs, _ = chunk_delta_rule(q, k, v, strength.bfloat16(), **options)
        else:
            g = logsigmoid(gate[..., 0]) / 2
            theirs, _ = chunk_gated_delta_rule(q, k, v, g, strength, **options)
    else:
        make = {
            "retnet": retnet,
            "gla": lambda k, gate: (k, logsigmoid(gate) / 16),
            "hgrn2": lambda k, gate: (-torch.expm1(logsigmoid(gate)), logsigmoid(gate)),
        }[name]
        k, g = make(k, gate)
        theirs, _ = chunk_gla(q, k.to(q.dtype), v, g.expand(k.shape).contiguous().cuda(), **options)
    ours, theirs = ((x.double() - exact).square().mean().sqrt() for x in (ours, theirs))
    assert ours < 3 * theirs
    assert theirs < 0.02 * exact.square().mean().sqrt()


def test_delta_rule_reads_back_what_was_written_and_overwrites_it():
    k = torch.eye(4, dtype=torch.float64).view(1, 4, 1, 4)
    v = torch.randn(1, 4, 1, 3, dtype=torch.float64)
    one = torch.ones(1, 4, 1, dtype=torch.float64)
    for backend in ("naive", "chunked"):
        options = {"scale": 1.0, "output_final_state": True, "backend": backend}
        _, state = delta_rule(k, k, v, one, **options)
        torch.testing.assert_close(state[0, 0], v[0, :, 0])  # row i is the value of key i
        o, _ = delta_rule(k, k, 5 * v, one, initial_state=state, **options)
        torch.testing.assert_close(o, 5 * v)  # an additive memory would read 6 v
        added, _ = gla(k, k, 5 * v, 0 * k, initial_state=state, scale=1.0)
        torch.testing.assert_close(added, 6 * v)


def test_delta_rule_by_hand():
    """Two equal keys (0.6, 0.8), values 1 and 3, β = 1/2, gate 1/2 at the second token."""
    k = torch.tensor([0.6, 0.8], dtype=torch.float64).expand(1, 2, 1, 2)
    v = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta, g = torch.full((1, 2, 1), 0.5).double(), torch.tensor([0.0, 0.5]).double()
    g[1] = g[1].log()
    for backend in ("naive", "chunked"):
        o, state = delta_rule(
            k, k, v, beta, g.view(1, 2, 1), scale=1.0, output_final_state=True, backend=backend
        )
        # reads: 0.5, then half of it is left, 0.25, and half of the difference to 3 is added
        torch.testing.assert_close(o.flatten(), torch.tensor([0.5, 1.625]).double())
        torch.testing.assert_close(state.flatten(), 1.625 * k[0, 0, 0])


def test_gated_delta_rule_with_open_gates_is_the_delta_rule():
    q, k, v, _, beta, state = inputs()
    options = {"initial_state": state, "output_final_state": True}
    k, beta = F.normalize(k, dim=-1), beta.sigmoid()
    gated = delta_rule(q, k, v, beta, torch.zeros_like(beta), **options)
    for a, b in zip(gated, delta_rule(q, k, v, beta, **options), strict=True):
        assert torch.equal(a, b)


def test_delta_rule_with_orthogonal_keys_is_linear_attention_with_a_scalar_gate():
    """Nothing to erase, so that with β = 1 only the decay is left."""
    q, _, v, gate, _, _ = inputs(5)
    k = torch.eye(5, dtype=torch.float64).view(1, 5, 1, 5).expand(2, 5, 2, 5)
    g = logsigmoid(gate[..., 0])
    o, _ = delta_rule(q, k, v, torch.ones_like(g), g)
    expected, _ = gla(q, k, v, g.unsqueeze(-1))
    torch.testing.assert_close(o, expected)


def test_scan_of_a_convex_combination_stays_within_its_inputs():
    x = torch.randn(2, 50, 7, dtype=torch.float64)
    g = logsigmoid(torch.randn(2, 50, 7, dtype=torch.float64))
    h, _ = linear_scan(-torch.expm1(g) * x, g)
    assert (h.abs() <= x.abs().amax(1, keepdim=True)).all()


def test_hgrn2_with_keys_of_one_channel_has_the_update_of_hgrn():
    _, _, v, gate, _, _ = inputs(keys=1, values=1)
    g = logsigmoid(gate)
    k = -torch.expm1(g)
    o, _ = gla(torch.ones_like(k), k, v, g, scale=1.0)
    h, _ = linear_scan((k * v).flatten(2), g.flatten(2))
    torch.testing.assert_close(o.flatten(2), h)


@pytest.mark.parametrize("value", [-1e9, float("-inf")])
def test_closed_gates_forget_everything(value):
    q, k, v, _, beta, state = inputs(9)
    g = torch.zeros_like(beta)
    g[:, 4] = value
    k, beta = F.normalize(k, dim=-1), beta.sigmoid()
    o, _ = delta_rule(q, k, v, beta, g, initial_state=state)
    fresh, _ = delta_rule(*(x[:, 4:] for x in (q, k, v, beta)))
    torch.testing.assert_close(o[:, 4:], fresh)
    x, gates = v.flatten(2), g.repeat_interleave(3, 2)
    h, _ = linear_scan(x, gates)
    torch.testing.assert_close(h[:, 4:], linear_scan(x[:, 4:], torch.zeros_like(x[:, 4:]))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": torch.ones(1, 4, 3)}, r"shape \[B, T, H\] of q, \[1, 4, 2\]; got \[1, 4, 3\]"),
        ({"g": torch.ones(1, 4, 2, 5)}, "beta and g need the shape"),
        ({"k": torch.ones(1, 4, 2, 6)}, "q and k need one shape"),
        ({"beta": torch.ones(1, 4, 2).double()}, "float32"),
        ({"backend": "fast"}, "auto, naive, chunked; got 'fast'"),
        ({"chunk_size": 0}, "at least 1"),
        ({"initial_state": torch.ones(1, 2, 5, 4)}, r"needs the shape \[1, 2, 5, 3\]"),
    ],
)
def test_delta_rule_says_what_is_allowed(changes, message):
    q, k, v = torch.ones(1, 4, 2, 5), torch.ones(1, 4, 2, 5), torch.ones(1, 4, 2, 3)
    args = {"q": q, "k": k, "v": v, "beta": torch.ones(1, 4, 2)} | changes
    with pytest.raises(ValueError, match=message):
        delta_rule(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": torch.ones(1, 4, 6)}, r"one shape \[B, T, D\]"),
        ({"x": torch.ones(1, 4, 5).half(), "g": torch.ones(1, 4, 5).half()}, "float32 or float64"),
        ({"g": torch.ones(1, 4, 5).double()}, "need one type"),
        ({"initial_state": torch.ones(2, 5)}, r"needs the shape \[1, 5\]"),
        ({"backend": "chunked"}, "auto, naive, doubling; got 'chunked'"),
    ],
)
def test_scan_says_what_is_allowed(changes, message):
    args = {"x": torch.ones(1, 4, 5), "g": -torch.ones(1, 4, 5)} | changes
    with pytest.raises(ValueError, match=message):
        linear_scan(**args)
