"""Mixture-of-Head Attention: router, both forms, balance loss, identities, counts, cache."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.layers.language import Attention
from gatebook.measure.sequence import auxiliary_loss
from gatebook.models.moh import (
    HeadRouter,
    MoHAttention,
    MoHConfig,
    MoHLanguageModel,
    NormRouter,
    sparse_attention,
    top_mask,
)

SMALL = MoHConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=8, d_ff=24, n_shared=2, n_active=2)
KINDS = [
    {},
    {"form": "paper"},
    {"two_stage": False},
    {"n_shared": 0, "n_active": 4},
    {"n_shared": 8, "n_active": 0},
    {"router": "frozen"},
    {"router": "norm"},
    {"router": "norm", "n_kv_heads": 2},
    {"router": "none"},
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def lm(**changes):
    torch.manual_seed(0)
    return MoHLanguageModel(dataclasses.replace(SMALL, **changes)).double()


def layer(**changes):
    torch.manual_seed(0)
    return MoHAttention(dataclasses.replace(SMALL, **changes)).double()


def router(n_shared=2, n_active=2, **changes):
    torch.manual_seed(0)
    return HeadRouter(16, 8, n_shared=n_shared, n_active=n_active, **changes).double()


def inputs(length=9):
    return torch.randn(2, length, 16, dtype=torch.float64, generator=seeded(1))


def tokens(length=14):
    return torch.randint(11, (2, length), generator=seeded(1))


def zero(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("two_stage", [True, False])
def test_weights_are_those_of_the_equations(form, two_stage):
    """Loops over tokens and heads, with the K largest found by sorting."""
    gate, x = router(form=form, two_stage=two_stage).requires_grad_(False), inputs()
    g = gate(x)
    for b in range(2):
        for t in range(9):
            a = [math.exp(v) for v in (gate.stage.weight @ x[b, t])] if two_stage else [1.0, 1.0]
            alpha = [v / sum(a) for v in a]
            s = [math.exp(v) for v in gate.shared.weight @ x[b, t]]
            r = [math.exp(v) for v in gate.routed.weight @ x[b, t]]
            p = [v / sum(r) for v in r]
            kept = sorted(range(6), key=lambda i, p=p: -p[i])[:2]
            if form == "code":
                shared = [2 * alpha[0] * 2 * v / sum(s) for v in s]
                total = sum(p[i] for i in kept)
                routed = [2 * alpha[1] * 2 * p[i] / total * (i in kept) for i in range(6)]
            else:
                shared = [alpha[0] * v / sum(s) for v in s]
                routed = [alpha[1] * p[i] * (i in kept) for i in range(6)]
            expected = torch.tensor(shared + routed, dtype=torch.float64)
            torch.testing.assert_close(g[b, t], expected, atol=1e-12, rtol=0)


def test_sum_over_heads_equals_concatenation():
    """Σ_i g_i H^i W_O^i, with W_O cut into the rows of each head."""
    attention, x = layer(), inputs()
    o, _ = attention.attend(*attention.project(x), None)
    g = attention.router(x)
    w = attention.out.weight.unflatten(1, (8, 2))  # (D, H, d_h)
    total = sum(g[..., i, None] * (o[:, :, i] @ w[:, i].T) for i in range(8))
    torch.testing.assert_close(attention(x)[0], total, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n_shared", [0, 2, 7, 8])
def test_zero_routers_with_all_heads_active_are_multi_head_attention(n_shared):
    attention, x = layer(n_shared=n_shared, n_active=8 - n_shared), inputs()
    zero(attention.router)
    plain = Attention(16, 8).double()
    plain.load_state_dict(
        {k: v for k, v in attention.state_dict().items() if not k.startswith("router")}
    )
    torch.testing.assert_close(attention(x)[0], plain(x)[0], atol=1e-14, rtol=0)


def test_paper_form_at_zero_routers_shrinks_shared_and_routed_heads():
    g = zero(router(form="paper", n_active=6))(inputs())
    torch.testing.assert_close(g[..., :2], torch.full_like(g[..., :2], 1 / (2 * 2)))
    torch.testing.assert_close(g[..., 2:], torch.full_like(g[..., 2:], 1 / (2 * 6)))


def test_sum_of_weights():
    gate, x = router(), inputs()
    alpha = (x @ gate.stage.weight.T).softmax(-1)
    torch.testing.assert_close(gate(x).sum(-1), 2 * (alpha[..., 0] * 2 + alpha[..., 1] * 2))
    torch.testing.assert_close(zero(gate)(x).sum(-1), torch.full((2, 9), 4.0).double())


@pytest.mark.parametrize("changes", [{}, {"form": "paper"}, {"frozen": True}, {"n_shared": 0}])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_each_token_uses_all_shared_and_k_routed_heads(changes, k):
    gate = router(**{"n_active": k, **changes})
    g = gate(inputs())
    shared = gate.sizes[0]
    assert (g[..., :shared] > 0).all()
    assert ((g[..., shared:] > 0).sum(-1) == k).all()


def test_ties_still_give_k_heads():
    assert (top_mask(torch.zeros(3, 7), 4).sum(-1) == 4).all()
    assert ((zero(router())(inputs()) > 0).sum(-1) == 4).all()


def test_choice_depends_on_the_token_alone():
    gate, x = router(), inputs()
    other = x.clone()
    other[:, 5:] += 1.0
    assert torch.equal(gate(other)[:, :5], gate(x)[:, :5])
    torch.testing.assert_close(gate(x[:, [3]]), gate(x)[:, [3]])


@pytest.mark.parametrize(
    ("form", "uniform", "collapsed"), [("code", 2.0, 6.0), ("paper", 2 / 6, 1)]
)
def test_balance_loss_of_uniform_and_of_collapsed_routing(form, uniform, collapsed):
    gate = router(form=form)
    p = torch.full((600, 6), 1 / 6, dtype=torch.float64)
    mask = F.one_hot(torch.arange(600) % 6, 6) + F.one_hot((torch.arange(600) + 1) % 6, 6) > 0
    assert gate.load_balance(p, mask).item() == pytest.approx(uniform)
    p, mask = torch.zeros(600, 6).double(), torch.zeros(600, 6, dtype=torch.bool)
    p[:, :2], mask[:, :2] = 0.5, True
    assert gate.load_balance(p, mask).item() == pytest.approx(collapsed)


def test_balance_loss_reaches_the_router_through_the_mean_alone():
    gate, x = router(n_active=2), inputs()
    gate(x)
    gate.auxiliary_loss.backward()
    p = (x @ gate.routed.weight.detach().T).softmax(-1).requires_grad_()
    f = top_mask(p, 2).double().mean((0, 1))
    (expected,) = torch.autograd.grad(0.01 * 6 * (f * p.mean((0, 1))).sum(), p)
    through = torch.einsum("bte,btef,btd->fd", expected, softmax_jacobian(p), x)
    torch.testing.assert_close(gate.routed.weight.grad, through)
    assert gate.shared.weight.grad is None
    assert gate.stage.weight.grad is None


def softmax_jacobian(p):
    p = p.detach()
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def test_auxiliary_loss_is_the_mean_over_layers():
    model = lm()
    model(tokens())
    each = [block.mixer.router.auxiliary_loss for block in model.blocks]
    torch.testing.assert_close(auxiliary_loss(model), (each[0] + each[1]) / 2)
    assert auxiliary_loss(lm(router="none")) == 0.0
    assert auxiliary_loss(lambda x: x) == 0.0


@pytest.mark.parametrize(
    ("n_shared", "n_active", "added"),
    [(2, 2, 16 * (6 + 2 + 2)), (0, 4, 16 * 8), (8, 0, 16 * 8), (1, 3, 16 * (7 + 1 + 2))],
)
def test_parameters_of_a_router(n_shared, n_active, added):
    assert measure.parameters(router(n_shared, n_active)) == added


def test_a_single_shared_head_needs_no_router():
    gate = HeadRouter(16, 1, n_shared=1, n_active=0)
    assert measure.parameters(gate) == 0
    assert (gate(torch.randn(2, 3, 16)) == 1).all()


@pytest.mark.parametrize(
    ("name", "millions", "baseline"), [("moh_llm_s", 186, 186), ("moh_llm_b", 882, 881)]
)
def test_parameters_of_the_language_models(name, millions, baseline):
    with torch.device("meta"):
        count = measure.parameters(models.create(name))
        plain = measure.parameters(models.create(name, router="none"))
    config = models.config(name)
    assert round(count / 1e6) == millions
    assert round(plain / 1e6) == baseline
    assert count - plain == config.n_layers * config.d_model * (config.n_heads + 2)


def test_norm_router_chooses_the_longest_queries_and_counts_each_once():
    q = torch.randn(2, 5, 8, 4, dtype=torch.float64, generator=seeded(3))
    g = NormRouter(8, n_shared=4, n_active=2)(q)
    for b in range(2):
        for t in range(5):
            lengths = [q[b, t, i].square().sum().sqrt().item() for i in range(4, 8)]
            kept = sorted(range(4), key=lambda i, v=lengths: -v[i])[:2]
            assert g[b, t].tolist() == pytest.approx(
                [1.0] * 4 + [float(i in kept) for i in range(4)]
            )


def test_norm_router_is_straight_through():
    """The gradient is that of the softmax of norms over their standard deviation."""
    q = torch.randn(1, 3, 8, 4, dtype=torch.float64, generator=seeded(3)).requires_grad_()
    weights = torch.randn(1, 3, 8, dtype=torch.float64, generator=seeded(4))
    (found,) = torch.autograd.grad((NormRouter(8, n_shared=4, n_active=2)(q) * weights).sum(), q)
    norms = q[:, :, 4:].square().sum(-1).sqrt()
    spread = ((norms - norms.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / 3).sqrt()
    (expected,) = torch.autograd.grad(((norms / spread).softmax(-1) * weights[..., 4:]).sum(), q)
    torch.testing.assert_close(found, expected)
    assert (found[:, :, :4] == 0).all()


def test_norm_router_takes_a_trained_models_weights():
    plain, routed = lm(router="none"), lm(router="norm", n_shared=4, n_active=4)
    routed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(routed(tokens()), plain(tokens()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_inactive_heads_need_not_be_computed(share):
    q, k, v = torch.randn(3, 2, 7, 4, 6, dtype=torch.float64, generator=seeded(0))
    active = torch.rand(2, 7, 4, generator=seeded(1)) < share
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(6)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    o = torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(-1), v)
    expected = o * active[..., None]
    torch.testing.assert_close(sparse_attention(q, k, v, active), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", KINDS)
def test_segments_with_carried_states_equal_the_whole(changes):
    model, x = lm(**changes), tokens()
    first, states = model.continue_from(x[:, :6], None)
    steps = []
    for t in range(6, 14):
        logits, states = model.continue_from(x[:, t : t + 1], states)
        steps.append(logits)
    torch.testing.assert_close(torch.cat([first, *steps], 1), model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", KINDS)
def test_logits_do_not_see_the_future(changes):
    model, x = lm(**changes), tokens()
    other = x.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :9], model(x)[:, :9], atol=0, rtol=0)
    assert (model(other)[:, 9:] - model(x)[:, 9:]).abs().min() > 0


@pytest.mark.parametrize("changes", KINDS)
def test_every_parameter_gets_a_gradient(changes):
    model, x = lm(**changes), tokens()
    loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten()) + auxiliary_loss(model)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_frozen_choice_has_equal_weights_and_no_parameters():
    gate, x = router(frozen=True, two_stage=False), inputs()
    assert [name for name, _ in gate.named_parameters()] == ["shared.weight"]
    routed = gate(x)[..., 2:]
    torch.testing.assert_close(routed, (routed > 0).double())


def test_weights_are_float32_under_half_precision():
    gate = router().bfloat16()
    assert gate(inputs().bfloat16()).dtype == torch.float32
    out, _ = layer().bfloat16()(inputs().bfloat16())
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(("n_shared", "n_active"), [(9, 0), (2, 7), (2, 0), (-1, 2), (8, 1)])
def test_heads_that_do_not_fit_raise(n_shared, n_active):
    with pytest.raises(ValueError, match=f"got {n_shared} and {n_active} of 8"):
        HeadRouter(16, 8, n_shared=n_shared, n_active=n_active)
    with pytest.raises(ValueError, match=f"got {n_shared} and {n_active} of 8"):
        dataclasses.replace(SMALL, n_shared=n_shared, n_active=n_active)


@pytest.mark.parametrize(("field", "value"), [("router", "hash"), ("form", "text")])
def test_unknown_choices_raise(field, value):
    with pytest.raises(ValueError, match=f"{field} must be one of .*; got '{value}'"):
        dataclasses.replace(SMALL, **{field: value})
