"""Clipped softmax and gated heads: identities, counts, oracles of BERT, OPT and ViT, decoding."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.measure.quantization import quantize_model
from gatebook.models.quantizable import (
    HeadGate,
    QuantizableConfig,
    QuantizableModel,
    clipped_softmax,
)

SIZE = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 12, "dropout": 0.0, "init_std": 0.3}
BERT = QuantizableConfig(family="bert", n_out=11, n_positions=20, length=20, **SIZE)
OPT = dataclasses.replace(BERT, family="opt")
VIT = dataclasses.replace(
    BERT, family="vit", n_out=5, n_positions=10, length=10, patch=2, norm_eps=1e-6
)
HEADS = {
    "vanilla": {},
    "clipped": {"alpha": 4.0},
    "stretched": {"alpha": 4.0, "zeta": 1.1},
    "linear": {"gate": "linear"},
    "mlp": {"gate": "mlp"},
    "all-heads": {"gate": "all-heads"},
}


def made(config, **changes):
    torch.manual_seed(0)
    model = QuantizableModel(dataclasses.replace(config, **changes)).double().eval()
    with torch.no_grad():  # biases and norms that do something
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            if "class_token" in name:
                parameter.normal_()
    return model


def tokens(length=20):
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- clipped softmax


def rows(n=7):
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(50, n, generator=generator, dtype=torch.float64)


def test_without_stretch_it_is_softmax():
    assert torch.equal(clipped_softmax(rows(), 0.0), rows().softmax(-1))


def test_equation_number_by_number():
    x, gamma, zeta = rows(), -0.05, 1.1
    for row, found in zip(x.tolist(), clipped_softmax(x, gamma, zeta).tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        for v, p in zip(row, found, strict=True):
            raw = (zeta - gamma) * math.exp(v) / total + gamma
            assert p == pytest.approx(min(1.0, max(0.0, raw)), abs=1e-14)


def test_where_it_is_exactly_zero_and_exactly_one():
    x, gamma, zeta = rows(), -0.05, 1.1
    p, found = x.softmax(-1), clipped_softmax(x, gamma, zeta)
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    assert torch.equal(found == 0, p <= low)
    assert torch.equal(found == 1, p >= high)
    assert (found == 0).any()
    assert (found == 1).any()


@pytest.mark.parametrize("alpha", [1.5, 2, 3, 4])
@pytest.mark.parametrize("length", [16, 32, 128])
def test_uniform_attention_is_all_zeros_from_the_predicted_width_on(alpha, length):
    """n equal scores become zeros if and only if n ≥ (T + α) / α."""
    for n in range(1, length + 1):
        found = clipped_softmax(torch.zeros(n, dtype=torch.float64), -alpha / length)
        predicted = n * alpha >= (length + alpha) * (1 - 1e-12)
        assert bool((found < 1e-15).all()) == predicted


@pytest.mark.parametrize(("alpha", "idle"), [(1.0, False), (1.06, False), (1.07, True)])
def test_a_full_row_can_be_idle_if_alpha_exceeds_t_over_t_minus_one(alpha, idle):
    found = clipped_softmax(torch.zeros(16, dtype=torch.float64), -alpha / 16)
    assert bool((found == 0).all()) == idle


def test_masked_keys_keep_a_weight_of_zero():
    x = rows()
    x[:, 2] = float("-inf")
    assert clipped_softmax(x, -0.05, 1.1)[:, 2].abs().max() == 0


def test_clipped_rows_send_no_gradient():
    x = torch.zeros(3, 20, dtype=torch.float64)
    x[1:, 0], x[2, 0] = 2.0, 30.0
    x.requires_grad_()
    found = clipped_softmax(x, -0.1)
    assert torch.equal(found[0], torch.zeros(20, dtype=torch.float64))
    (found * torch.randn(3, 20, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert x.grad[0].abs().max() == 0
    assert x.grad[1].abs().max() > 0


def test_rows_are_not_normed_again():
    assert clipped_softmax(rows(), -0.05).sum(-1).max() < 1


def test_gap_that_softmax_needs_for_a_small_rest():
    """ln((T − 1)(1 − ε) / ε) on one of T scores leaves ε on the others; clipping needs less."""
    length, rest = 16, 1e-3
    x = torch.zeros(length, dtype=torch.float64)
    x[0] = math.log((length - 1) * (1 - rest) / rest)
    assert x.softmax(-1)[1:].sum().item() == pytest.approx(rest)
    x[0] /= 2
    assert clipped_softmax(x, -4 / length)[1:].sum() == 0


@pytest.mark.parametrize(("gamma", "zeta"), [(0.1, 1.0), (0.0, 0.9)])
def test_a_wrong_stretch_is_refused(gamma, zeta):
    with pytest.raises(ValueError, match="gamma is at most 0 and zeta at least 1"):
        clipped_softmax(rows(), gamma, zeta)


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(("gate", "count"), [("linear", 780), ("mlp", 12_684), ("all-heads", 9228)])
def test_gate_parameters_of_a_layer(gate, count):
    gate = HeadGate(models.config("quantizable_bert_base", gate=gate))
    assert measure.parameters(gate) == count


def test_each_head_sees_its_own_slice():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8)
    other = x.clone()
    other[..., :4] += 1.0
    for gate, moved in (
        ("linear", [True, False]),
        ("mlp", [True, False]),
        ("all-heads", [True] * 2),
    ):
        made_gate = HeadGate(dataclasses.replace(BERT, gate=gate))
        change = (made_gate(other) - made_gate(x)).abs().amax((0, 1))
        assert [bool(c > 1e-7) for c in change] == moved


@pytest.mark.parametrize("gate", ["linear", "mlp", "all-heads"])
def test_scores_equal_small_networks(gate):
    """One nn.Sequential for each head, with the gate's weights."""
    torch.manual_seed(0)
    config = dataclasses.replace(BERT, d_model=16, gate=gate)
    made_gate, x = HeadGate(config), torch.randn(2, 3, 16)
    for h in range(2):
        if gate == "all-heads":
            expected = F.linear(x, made_gate.all_heads.weight[h : h + 1])
            expected = expected[..., 0] + made_gate.all_heads.bias[h]
        else:
            y = x[..., 8 * h : 8 * h + 8]
            for number, (w, b) in enumerate(zip(made_gate.weights, made_gate.biases, strict=True)):
                y = F.linear(torch.relu(y) if number else y, w[h].T, b[h])
            expected = y[..., 0]
        torch.testing.assert_close(made_gate(x)[..., h], 1 / (1 + torch.exp(-expected)))


@pytest.mark.parametrize("start", [0.1, 0.25, 0.5, 0.9])
def test_linear_gate_starts_at_pi_init(start):
    gate = (
        QuantizableModel(dataclasses.replace(OPT, gate="linear", pi_init=start))
        .blocks[0]
        .mixer.gate
    )
    assert gate(torch.zeros(1, 1, 8))[0, 0].tolist() == pytest.approx([start] * 2, abs=1e-6)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all-heads"])
def test_gates_keep_their_own_start_in_a_model(gate):
    """The model's own initialisation (here of std 0) leaves them alone, as in the release."""
    model = QuantizableModel(dataclasses.replace(BERT, gate=gate, init_std=0.0))
    found = model.blocks[1].mixer.gate
    weight = found.all_heads.weight if gate == "all-heads" else found.weights[0]
    assert weight.abs().max() > 0.05


@pytest.mark.parametrize("config", [BERT, OPT])
def test_an_open_gate_is_vanilla(config):
    gated, plain = made(config, gate="linear"), made(config)
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        for block in gated.blocks:
            block.mixer.gate.biases[0].fill_(100.0)
    torch.testing.assert_close(gated(tokens()), plain(tokens()), atol=1e-12, rtol=0)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quantizable_bert_base", 109_512_762),
        ("quantizable_opt_125m", 125_237_760),
        ("quantizable_vit_s", 22_051_432),
    ],
)
def test_parameters_at_the_papers_sizes(name, expected):
    """BERT-base with its masked-word head but without segment embeddings (2 · 768)."""
    with torch.device("meta"):
        assert measure.parameters(models.create(name)) == expected


def attention_by_hand(mixer, x, c):
    """One sequence `[T, D]`, in loops over heads and queries."""
    width = c.d_model // c.n_heads
    rows = []
    for t in range(len(x)):
        joined = []
        for h in range(c.n_heads):
            part = slice(width * h, width * h + width)
            keys = range(t + 1) if c.family == "opt" else range(len(x))
            q = mixer.query.weight[part] @ x[t] + mixer.query.bias[part]
            k = [mixer.key.weight[part] @ x[j] + mixer.key.bias[part] for j in keys]
            v = [mixer.value.weight[part] @ x[j] + mixer.value.bias[part] for j in keys]
            e = torch.stack([(q @ kk / math.sqrt(width)).exp() for kk in k])
            gamma = -c.alpha / c.length
            p = ((c.zeta - gamma) * e / e.sum() + gamma).clamp(0, 1)
            y = sum(pp * vv for pp, vv in zip(p, v, strict=True))
            joined.append(y if c.gate == "none" else y * mixer.gate(x[None])[0, t, h])
        rows.append(mixer.out.weight @ torch.cat(joined) + mixer.out.bias)
    return torch.stack(rows)


def norm_by_hand(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        + norm.bias
    )


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("config", [BERT, OPT, VIT], ids=["bert", "opt", "vit"])
@pytest.mark.parametrize("heads", HEADS)
def test_model_equals_its_equations(config, heads):
    model = made(config, **HEADS[heads])
    c = model.config
    if c.family == "vit":
        x = pictures()
        cut = F.unfold(x[:1], 2, stride=2)[0].T  # (9, 3 · 2 · 2)
        patches = cut @ model.patches.weight.flatten(1).T + model.patches.bias
        y = torch.cat([model.class_token[0], norm_by_hand(model.embedding_norm, patches)])
    else:
        x = tokens(6)
        y = model.embedding.weight[x[0]]
    y = y + model.positions.weight[: len(y)]
    y = norm_by_hand(model.embedding_norm, y) if c.family == "bert" else y
    act = torch.relu if c.family == "opt" else gelu
    for b in model.blocks:

        def feed(z, b=b):
            inner = act(z @ b.ffn.up.weight.T + b.ffn.up.bias)
            return inner @ b.ffn.down.weight.T + b.ffn.down.bias

        if c.family == "bert":
            y = norm_by_hand(b.mixer_norm, y + attention_by_hand(b.mixer, y, c))
            y = norm_by_hand(b.ffn_norm, y + feed(y))
        else:
            y = y + attention_by_hand(b.mixer, norm_by_hand(b.mixer_norm, y), c)
            y = y + feed(norm_by_hand(b.ffn_norm, y))
    if c.family == "bert":
        y = gelu(y @ model.transform[0].weight.T + model.transform[0].bias)
        y = norm_by_hand(model.transform[2], y) @ model.embedding.weight.T + model.head.bias
    elif c.family == "opt":
        y = norm_by_hand(model.norm, y) @ model.embedding.weight.T
    else:
        y = norm_by_hand(model.norm, y[0]) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x)[0], y, atol=1e-10, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_segments_with_carried_states_equal_the_whole(heads):
    """γ comes from the length of training, not from that of the input."""
    model, x = made(OPT, **HEADS[heads]), tokens()
    found, states = model.continue_from(x[:, :7], None)
    parts = [found]
    for t in range(7, 20):
        part, states = model.continue_from(x[:, t : t + 1], states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_opt_does_not_see_the_future_and_bert_does(heads):
    x = tokens()
    other = x.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    model = made(OPT, **HEADS[heads])
    torch.testing.assert_close(model(other)[:, :12], model(x)[:, :12], atol=0, rtol=0)
    both = made(BERT, **HEADS[heads])
    assert (both(other)[:, :12] - both(x)[:, :12]).abs().max() > 1e-6


@pytest.mark.parametrize("heads", HEADS)
def test_every_parameter_gets_a_gradient(heads):
    for config in (BERT, OPT, VIT):
        model = made(config, **HEADS[heads])
        x = pictures() if config.family == "vit" else tokens()
        (model(x) ** 3).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_a_state_for_a_model_without_direction_is_refused():
    model = made(BERT)
    _, states = model.continue_from(tokens(4), None)
    with pytest.raises(ValueError, match="reads in both directions: it has no state"):
        model.continue_from(tokens(4), states)


@pytest.mark.parametrize("config", [BERT, OPT, VIT], ids=["bert", "opt", "vit"])
def test_look_shows_what_the_blocks_do(config):
    model = made(config, alpha=4.0, gate="linear")
    x = pictures() if config.family == "vit" else tokens()
    seen = list(model.look(x))
    assert len(seen) == 2
    torch.testing.assert_close(model.classify(seen[-1].output), model(x))
    for found in seen:
        torch.testing.assert_close(
            found.weights, clipped_softmax(found.logits, -4.0 / config.length)
        )
        assert found.gate.shape == (*found.ffn.shape[:2], 2)
    if config.family == "bert":
        last = model.blocks[1]
        sums = nn.functional.layer_norm(
            last.mixer_norm(seen[0].output + last.mixer(seen[0].output)[0]) + seen[1].ffn,
            (8,),
            last.ffn_norm.weight,
            last.ffn_norm.bias,
            1e-12,
        )
        torch.testing.assert_close(seen[1].output, sums)
    assert next(made(config).look(x)).gate is None


@pytest.mark.parametrize("config", [BERT, OPT, VIT], ids=["bert", "opt", "vit"])
def test_quantiser_reaches_every_tensor_but_the_gates_and_the_last_map(config):
    model = made(config, alpha=4.0, gate="all-heads")
    x = pictures() if config.family == "vit" else tokens()
    rounded = quantize_model(model, [x], bits=16, skip=("gate", "head"))
    torch.testing.assert_close(rounded(x), model(x), atol=0.01, rtol=0.01)
    rough = quantize_model(model, [x], bits=3, skip=("gate", "head"))
    after = dict(rough.named_parameters())
    for name, before in model.named_parameters():
        kept = {"gate", "head", "bias", "class_token"} & set(name.split("."))
        assert torch.equal(before, after[name]) == bool(kept), name
    hooked = {name for name, module in rough.named_modules() if module._forward_hooks}
    leaves = {name for name, module in rough.named_modules() if not list(module.children())}
    left = {name for name in leaves - hooked if "dropout" not in name}
    assert left == {"head", *(f"blocks.{i}.mixer.gate.all_heads" for i in range(2))}


def test_dropout_acts_on_clipped_weights_in_training_only():
    model = made(OPT, alpha=4.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert torch.equal(model(tokens()), model(tokens()))
    assert not torch.equal(model.train()(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt"}, "family must be one of bert, opt, vit"),
        ({"gate": "wide"}, "gate must be one of none, linear, mlp, all-heads"),
        ({"n_heads": 3}, "n_heads=3 must divide d_model=8"),
        ({"alpha": -1.0}, "alpha is at least 0"),
        ({"zeta": 0.5}, "alpha is at least 0 and zeta 1"),
        ({"pi_init": 1.0}, "pi_init lies between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BERT, **changes)
