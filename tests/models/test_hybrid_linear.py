"""Hybrids of linear and softmax attention: counts, mixers, which block is which, states."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.kernels import delta_rule, gla
from gatebook.layers.language import Attention, rotate
from gatebook.models.hybrid_linear import (
    HGRN,
    HGRN2,
    DeltaNet,
    GatedDeltaNet,
    HybridConfig,
    HybridLanguageModel,
    LowerBounds,
    RetNet,
    mixer_flops,
    softmax_layers,
)

VARIANTS = ("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet")
SMALL = HybridConfig(
    vocab_size=11, d_model=16, n_layers=4, linear="gla", n_heads=2, softmax_heads=2, d_ff=24
)


def small(**changes):
    torch.manual_seed(0)
    return HybridLanguageModel(dataclasses.replace(SMALL, **changes)).double()


def tokens(length=20, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def x(length=9, width=16):
    gen = torch.Generator().manual_seed(2)
    return torch.randn(2, length, width, generator=gen, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hgrn_pure_340m", 373_916_672),
        ("hgrn2_pure_340m", 373_916_672),
        ("retnet_pure_340m", 380_165_120),
        ("gla_pure_340m", 374_475_776),
        ("deltanet_pure_340m", 374_362_112),
        ("hgrn_pure_1.3b", 1_364_396_032),
        ("hgrn2_pure_1.3b", 1_364_396_032),
        ("retnet_pure_1.3b", 1_351_727_104),
        ("gla_pure_1.3b", 1_365_514_240),
    ],
)
def test_parameters_are_those_of_flash_linear_attention(name, count):
    with torch.device("meta"):
        assert measure.parameters(models.create(f"hybrid_{name}")) == count


def test_every_published_ratio_is_a_model():
    found = set(models.list_models("hybrid_*"))
    ratios = ("pure", "24to1", "12to1", "6to1", "3to1")
    wanted = {f"hybrid_{v}_{r}_{s}" for v in VARIANTS for r in ratios for s in ("340m", "1.3b")}
    assert found == wanted | {"hybrid_transformer_340m", "hybrid_transformer_1.3b"}


@pytest.mark.parametrize(
    ("name", "floats"),
    [
        ("hgrn", 1024),
        ("gla", 131_072),
        ("hgrn2", 131_072),
        ("deltanet", 131_072),
        ("retnet", 262_144),
    ],
)
def test_state_of_a_layer(name, floats):
    with torch.device("meta"):
        model = models.create(f"hybrid_{name}_pure_340m", n_layers=1)
        _, (state,) = model.continue_from(torch.zeros(1, 3, dtype=torch.long), None)
    matrix = state[0] if isinstance(state, tuple) else state
    assert matrix.numel() == floats


@pytest.mark.parametrize("ratio", [1, 3, 6])
def test_the_softmax_blocks_close_each_group(ratio):
    config = dataclasses.replace(SMALL, ratio=ratio, n_layers=14)
    expected = [i for i in range(14) if (i + 1) % (ratio + 1) == 0]
    assert softmax_layers(config) == expected
    kinds = [isinstance(b.mixer, Attention) for b in HybridLanguageModel(config).blocks]
    assert [i for i, softmax in enumerate(kinds) if softmax] == expected
    first = dataclasses.replace(config, softmax_first=True)
    assert softmax_layers(first) == [i for i in range(14) if i % (ratio + 1) == 0]


def test_pure_and_full_models():
    assert softmax_layers(SMALL) == []
    assert softmax_layers(dataclasses.replace(SMALL, ratio=0)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ratio", "share"), [(3, 4), (6, 7)])
def test_the_cache_shrinks_by_the_share_of_softmax_blocks(ratio, share):
    depth = ratio + 1
    _, states = small(ratio=ratio, n_layers=2 * depth).continue_from(tokens(), None)
    full = small(ratio=0, n_layers=2 * depth).continue_from(tokens(), None)[1]
    caches = [sum(kv.numel() for kv in s) for s in states if isinstance(s, tuple)]
    assert len(full) * sum(kv.numel() for kv in full[0]) == share * sum(caches)


def test_operations_of_table_4():
    found = {name: mixer_flops(name, 1024, 8, 4096) for name in ("softmax", *VARIANTS)}
    unit = 1024**2 // 8
    assert found == {
        "softmax": 2 * 4096 * 1024,
        "hgrn": 5 * 1024,
        "retnet": 5 * unit,
        "gla": 7 * unit,
        "hgrn2": 7 * unit,
        "deltanet": 8 * unit,
        "gated_deltanet": 8 * unit,
    }


def test_lower_bounds_start_at_zero_and_never_fall():
    bounds = LowerBounds(5, 7)
    torch.nn.init.normal_(bounds.table)
    rows = torch.stack([bounds(i) for i in range(5)])
    assert not rows[0].any()
    assert (rows.diff(dim=0) > 0).all()
    assert (rows < 1).all()
    shares = bounds.table.softmax(0)
    torch.testing.assert_close(rows, shares.cumsum(0) - shares[0])


@pytest.mark.parametrize("layer", [0, 2])
def test_hgrn_equals_its_equations(layer):
    torch.manual_seed(0)
    bounds = LowerBounds(3, 16).double()
    torch.nn.init.normal_(bounds.table)
    mixer = HGRN(bounds, layer, 16).double()
    h, rows = torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(9):
        now = x()[:, t]
        alpha = bounds(layer) + (1 - bounds(layer)) * torch.sigmoid(mixer.forget(now))
        h = alpha * h + (1 - alpha) * F.silu(mixer.input(now))
        normed = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        rows.append(mixer.out(normed * F.silu(mixer.output_gate(now))))
    found, state = mixer(x())
    torch.testing.assert_close(found, torch.stack(rows, 1), atol=1e-10, rtol=0)
    torch.testing.assert_close(state, h, atol=1e-10, rtol=0)


def test_hgrn2_equals_its_equations():
    torch.manual_seed(0)
    bounds = LowerBounds(3, 16).double()
    torch.nn.init.normal_(bounds.table)
    mixer = HGRN2(bounds, 1, 16, n_heads=2).double()
    alpha = bounds(1) + (1 - bounds(1)) * torch.sigmoid(mixer.forget(x()))
    q, v = F.silu(mixer.query(x())), mixer.input(x())
    states, rows = torch.zeros(2, 2, 8, 8, dtype=torch.float64), []
    for t in range(9):
        a, qt, vt = (y[:, t].view(2, 2, 8) for y in (alpha, q, v))
        states = a[..., None] * states + (1 - a)[..., None] * vt[..., None, :]
        o = torch.einsum("bhk,bhkv->bhv", qt, states).flatten(1) * 8**-0.5
        rows.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight)
    torch.testing.assert_close(mixer(x())[0], mixer.out(torch.stack(rows, 1)), atol=1e-10, rtol=0)


def test_retnet_equals_its_equations():
    torch.manual_seed(0)
    mixer = RetNet(16, 2).double()
    q, k = (rotate(f(x()).unflatten(-1, (2, 8)), 10_000.0) for f in (mixer.query, mixer.key))
    v = mixer.value(x()).unflatten(-1, (2, 16))
    t = torch.arange(9, dtype=torch.float64)
    heads = []
    for h, gamma in enumerate((31 / 32, 63 / 64)):
        decay = (gamma ** (t[:, None] - t)).tril()
        o = (q[:, :, h] @ k[:, :, h].mT * decay) @ v[:, :, h] * 8**-0.5
        heads.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight)
    y = torch.cat(heads, -1) * F.silu(mixer.output_gate(x()))
    torch.testing.assert_close(mixer(x())[0], mixer.out(y), atol=1e-6, rtol=0)  # γ in float32


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
def test_delta_nets_equal_their_equations(kind):
    torch.manual_seed(0)
    mixer = kind(16, n_heads=2, d_key=4, d_value=8).double()
    q, k, v = (
        F.silu(
            F.conv1d(F.pad(f(x()).mT, (3, 0)), c.conv.weight, groups=f.out_features).mT
        ).unflatten(-1, (2, -1))
        for f, c in zip(mixer.maps, mixer.convs, strict=True)
    )
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    beta = torch.sigmoid(mixer.strength(x()))
    alpha = torch.ones_like(beta)
    if kind is GatedDeltaNet:
        step = F.softplus(mixer.gate(x()) + mixer.step_bias)
        alpha = torch.exp(-mixer.log_rate.exp() * step)
    eye, state, rows = torch.eye(4).double(), torch.zeros(2, 2, 4, 8).double(), []
    for t in range(9):
        kk = k[:, t, :, :, None] * k[:, t, :, None, :]
        keep = alpha[:, t, :, None, None] * (eye - beta[:, t, :, None, None] * kk)
        write = beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        state = keep @ state + write
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], state) * 4**-0.5
        rows.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight)
    y = torch.stack(rows, 1).flatten(-2)
    if kind is GatedDeltaNet:
        y = y * F.silu(mixer.output_gate(x()))
    torch.testing.assert_close(mixer(x())[0], mixer.out(y), atol=1e-9, rtol=0)


def test_gates_of_gated_deltanet_start_in_the_published_range():
    torch.manual_seed(0)
    mixer = GatedDeltaNet(16, n_heads=2000, d_key=1, d_value=1)
    step, rate = F.softplus(mixer.step_bias), mixer.log_rate.exp()
    assert 1e-3 <= step.min() < 1.1e-3 < 0.09 < step.max() <= 0.1001
    assert step.log().mean().item() == pytest.approx(torch.tensor(1e-2).log().item(), abs=0.1)
    assert 0 < rate.min() < 0.1 < 15.9 < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8, abs=0.4)
    model = HybridLanguageModel(dataclasses.replace(SMALL, linear="gated_deltanet"))
    assert 0 < model.blocks[0].mixer.log_rate.exp().max() <= 16


def test_gla_with_fixed_gates_is_retnet_without_rotation():
    """At the level of the operator: the same γ for every key channel of a head."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 2, 4, generator=gen, dtype=torch.float64)
    gamma = RetNet(8, 2).log_gamma.double().view(1, 1, 2, 1)
    one = gla(q, k, v, gamma.expand(1, 12, 2, 1))[0]
    many = gla(q, k, v, gamma.expand(1, 12, 2, 4).contiguous())[0]
    torch.testing.assert_close(one, many)


def test_gated_deltanet_whose_gates_are_open_is_deltanet():
    torch.manual_seed(0)
    gated = GatedDeltaNet(16, n_heads=2, d_key=8, d_value=8).double()
    with torch.no_grad():
        gated.log_rate.fill_(-100.0)  # α = exp(−e^A …) = 1
    plain = DeltaNet(16, n_heads=2, d_key=8, d_value=8).double()
    plain.load_state_dict(gated.state_dict(), strict=False)
    gated.read = lambda o, x: o
    torch.testing.assert_close(gated(x())[0], plain(x())[0])


def test_without_erasing_the_delta_rule_is_linear_attention():
    """Keys that lie apart leave nothing to erase; others do, and the two differ."""
    gen = torch.Generator().manual_seed(0)
    q, v = torch.randn(2, 1, 6, 1, 6, generator=gen, dtype=torch.float64)
    beta, g = torch.ones(1, 6, 1).double(), -torch.rand(1, 6, 1, generator=gen).double()
    apart, same = torch.eye(6).double().view(1, 6, 1, 6), torch.full((1, 6, 1, 6), 6**-0.5).double()
    for k, equal in ((apart, True), (same, False)):
        o, _ = delta_rule(q, k, v, beta, g)
        assert torch.allclose(o, gla(q, k, v, g[..., None])[0]) == equal


CHANGES = [{"linear": v} for v in VARIANTS] + [
    {"linear": "hgrn2", "ratio": 3},
    {"linear": "gated_deltanet", "ratio": 1},
    {"linear": "retnet", "ratio": 1, "softmax_first": True},
    {"linear": "gla", "ratio": 3, "conv_width": 3},
    {"ratio": 0},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_segments_with_carried_states_equal_the_whole(changes):
    model = small(**changes)
    whole, states, parts = model(tokens()), None, []
    for start, end in ((0, 7), (7, 8), (8, 20)):  # one token alone takes the recurrence
        part, states = model.continue_from(tokens()[:, start:end], states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_logits_do_not_see_the_future(changes):
    model, other = small(**changes), tokens()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :12], model(tokens())[:, :12], atol=1e-12, rtol=0)
    assert (model(other)[:, 12:] - model(tokens())[:, 12:]).abs().min() > 0


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_parameter_gets_a_gradient(changes):
    model = small(**changes)
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_copy_has_its_own_lower_bounds():
    model = small(linear="hgrn2")
    other = copy.deepcopy(model)
    before = model(tokens())
    with torch.no_grad():
        torch.nn.init.normal_(other.bounds.table)
    assert torch.equal(model(tokens()), before)
    assert not torch.equal(other(tokens()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", VARIANTS)
def test_autocast_and_narrow_weights_work(linear, dtype):
    model = small(linear=linear, ratio=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens())
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear": "mamba"}, "hgrn, retnet, gla, hgrn2, deltanet, gated_deltanet; got 'mamba'"),
        ({"ratio": -2}, "-1 .no softmax. or at least 0; got -2"),
    ],
)
def test_bad_configurations_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
