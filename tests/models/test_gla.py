"""The GLA Transformer: counts at the paper's sizes, gates, layer, block, carried state."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.models.gla import GLA, GLAConfig, GLALanguageModel, LogGate

SMALL = GLAConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=2, d_ff=32, chunk_size=8)
GATES = ("none", "fixed", "scalar", "vector")


def small(**changes):
    torch.manual_seed(0)
    return GLALanguageModel(dataclasses.replace(SMALL, **changes)).double()


def tokens(length=20, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "whole", "without_embeddings"),
    [("gla_340m", 374_475_776, 308_939_776), ("gla_1.3b", 1_365_514_240, 1_234_442_240)],
)
def test_parameters_are_those_of_flash_linear_attention(name, whole, without_embeddings):
    with torch.device("meta"):
        model = models.create(name)
    assert measure.parameters(model) == whole
    assert measure.parameters(model, without=("embedding", "head")) == without_embeddings


def test_layer_parameters_at_width_1024():
    config = models.config("gla_340m")
    with torch.device("meta"):
        layer = GLA(config)
        block = models.create("gla_340m", n_layers=1).blocks[0]
    assert measure.parameters(layer) == 4_219_648
    assert measure.parameters(block.ffn) == 8_650_752
    assert measure.parameters(layer) == pytest.approx(4 * 1024**2, rel=0.01)


@pytest.mark.parametrize(("name", "floats"), [("gla_340m", 131_072), ("gla_1.3b", 524_288)])
def test_state_of_a_layer(name, floats):
    with torch.device("meta"):
        model = models.create(name, n_layers=1)
        _, states = model.continue_from(torch.zeros(1, 3, dtype=torch.long), None)
    assert states[0].numel() == floats


def test_flops_of_a_forward_pass():
    """Two for each weight outside the embedding, and the operator's own products."""
    with torch.device("meta"):
        model = models.create("gla_340m", n_layers=1)
        found = measure.flops(model, torch.zeros(1, 64, dtype=torch.long)) / 64
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    weights = 2 * (matrices - model.embedding.weight.numel())
    h, k, v, c = 4, 128, 256, 64
    products = 2 * h * (2 * k * v + c * v)  # K ᵀ V, Q S and P V; the products inside P come on top
    assert weights + products < found < weights + products + 2 * h * c * k


@pytest.mark.parametrize("gate", GATES)
def test_log_gates_are_not_positive_and_float32(gate):
    config = dataclasses.replace(SMALL, gate=gate)
    g = LogGate(config, 4).bfloat16()(torch.randn(2, 5, 16).bfloat16())
    if gate in ("scalar", "vector"):
        assert g.dtype == torch.float32
    assert g.shape == (2, 5, 2, 4 if gate == "vector" else 1)
    assert (g <= 0).all()


def test_gate_of_zero_logits_halves_the_memory_every_16_tokens():
    gate = LogGate(SMALL, 4)
    nn.init.zeros_(gate.up.weight)
    nn.init.zeros_(gate.up.bias)
    g = gate(torch.randn(1, 1, 16))
    torch.testing.assert_close(16 * g, torch.full_like(g, math.log(0.5)))


def test_temperature_divides_after_the_logsigmoid():
    gate = LogGate(SMALL, 4)
    x = torch.randn(2, 5, 16)
    alpha = torch.sigmoid(gate.up(gate.down(x))) ** (1 / 16)
    torch.testing.assert_close(gate(x).exp().flatten(-2), alpha)


def test_fixed_gates_are_retnets():
    config = dataclasses.replace(SMALL, gate="fixed", n_heads=4)
    g = LogGate(config, 4)(torch.randn(1, 1, 16))
    expected = torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256])
    torch.testing.assert_close(g.exp().flatten(), expected)


def test_unknown_gate_raises():
    with pytest.raises(ValueError, match="none, fixed, scalar or vector; got 'matrix'"):
        LogGate(dataclasses.replace(SMALL, gate="matrix"), 4)


def test_heads_that_do_not_divide_the_width_raise():
    with pytest.raises(ValueError, match="n_heads=3 must divide the key width 8 and value 16"):
        GLA(dataclasses.replace(SMALL, n_heads=3))


@pytest.mark.parametrize("gate", GATES)
def test_layer_equals_its_equations(gate):
    """Against a loop over tokens and heads written from §4.4, with the layer's own weights."""
    torch.manual_seed(0)
    layer = GLA(dataclasses.replace(SMALL, gate=gate)).double()
    x = torch.randn(6, 16, dtype=torch.float64)
    alpha = layer.log_gate(x[None])[0].expand(6, 2, 4).exp()
    q, k = (f(x).view(6, 2, 4) for f in (layer.query, layer.key))
    v = layer.value(x).view(6, 2, 8)
    rows = []
    state = torch.zeros(2, 4, 8, dtype=torch.float64)
    for t in range(6):
        heads = []
        for h in range(2):
            state[h] = torch.diag(alpha[t, h]) @ state[h] + torch.outer(k[t, h], v[t, h])
            o = q[t, h] @ state[h] * 4**-0.5
            heads.append(o / (o.square().mean() + SMALL.norm_eps).sqrt() * layer.norm.weight)
        rows.append(layer.out(F.silu(layer.output_gate(x[t])) * torch.cat(heads)))
    out, last = layer(x[None])
    torch.testing.assert_close(out[0], torch.stack(rows), atol=1e-10, rtol=0)
    torch.testing.assert_close(last[0], state, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_output_does_not_depend_on_the_scale_of_q_k_or_v(name):
    """Each head is normed, so only the norm's epsilon sees a common factor."""
    torch.manual_seed(0)
    layer = GLA(dataclasses.replace(SMALL, norm_eps=1e-20)).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    before = layer(x)[0]
    with torch.no_grad():
        getattr(layer, name).weight *= 7.0
    torch.testing.assert_close(layer(x)[0], before, atol=1e-10, rtol=0)


def test_norm_is_taken_head_by_head():
    """Multiplying the values of one head changes nothing, which a norm over all heads would."""
    torch.manual_seed(0)
    layer = GLA(dataclasses.replace(SMALL, norm_eps=1e-20)).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    before = layer(x)[0]
    with torch.no_grad():
        layer.value.weight[:8] *= 5.0
    torch.testing.assert_close(layer(x)[0], before, atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", [{"gate": g} for g in GATES] + [{"mixer": "attention"}])
def test_segments_with_carried_states_equal_the_whole(changes):
    model, x = small(**changes), tokens()
    first, states = model.continue_from(x[:, :7], None)
    second, _ = model.continue_from(x[:, 7:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", [{"gate": g} for g in GATES] + [{"mixer": "attention"}])
def test_logits_do_not_see_the_future(changes):
    model, x = small(**changes), tokens()
    other = x.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :12], model(x)[:, :12], atol=0, rtol=0)
    assert (model(other)[:, 12:] - model(x)[:, 12:]).abs().min() > 0


def test_every_backend_gives_the_same_model():
    x = tokens()
    expected = small(backend="naive")(x)
    for backend in ("parallel", "factorised", "chunked", "auto"):
        torch.testing.assert_close(small(backend=backend)(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gate", GATES)
def test_every_parameter_gets_a_gradient(gate):
    model, x = small(gate=gate), tokens()
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_have_the_configured_spread():
    model = GLALanguageModel(dataclasses.replace(SMALL, d_model=256, n_layers=1))
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].mixer.log_gate.up.bias.abs().max() == 0
