"""Sparse Query Attention: counts of the dense set, an oracle, identities, FLOPs, cache."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.kernels import softmax_attention
from gatebook.layers.language import Attention
from gatebook.models.sqa import (
    SparseQueryAttention,
    SQAConfig,
    SQALanguageModel,
    attention_flops,
)

SMALL = SQAConfig(
    vocab_size=11, d_model=32, n_layers=2, n_heads=8, n_query_heads=4, n_kv_heads=2, d_ff=24
)
HEADS = [(8, 8), (8, 2), (8, 1), (4, 4), (4, 2), (2, 1)]
COUNTS = {
    "mha": 11_966_224,
    "gqa": 11_179_792,
    "mqa": 10_983_184,
    "sqa": 10_655_504,
    "ssqa": 10_917_648,
    "xsqa": 10_393_360,
}


def config(h_q, h_kv, **changes):
    return dataclasses.replace(SMALL, n_query_heads=h_q, n_kv_heads=h_kv, **changes)


def layer(h_q, h_kv, **changes):
    torch.manual_seed(0)
    return SparseQueryAttention(config(h_q, h_kv, **changes)).double()


def inputs(length=7):
    return torch.randn(2, length, 32, dtype=torch.float64, generator=seeded(1))


def tokens(length=14):
    return torch.randint(11, (2, length), generator=seeded(1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def lm(h_q=4, h_kv=2):
    torch.manual_seed(0)
    return SQALanguageModel(config(h_q, h_kv)).double()


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameters_are_those_of_the_released_code(name, count):
    with torch.device("meta"):
        assert measure.parameters(models.create(f"sqa_{name}")) == count


def test_sqa_saves_65536_parameters_a_layer_over_gqa():
    with torch.device("meta"):
        sqa, gqa = (measure.parameters(models.create(f"sqa_{name}")) for name in ("sqa", "gqa"))
    assert (sqa - gqa) / 8 == -2 * 256 * (16 - 8) * 16 == -65_536


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_parameters_of_a_layer(h_q, h_kv):
    d, d_h = 32, 4
    assert measure.parameters(layer(h_q, h_kv)) == 2 * d * h_q * d_h + 2 * d * h_kv * d_h + d


def turn(x, t, base=10_000.0):
    """Rotary positions of one vector at position t, as complex numbers."""
    half = len(x) // 2
    turned = torch.complex(x[:half], x[half:]) * torch.exp(
        1j * t * base ** (-torch.arange(half, dtype=torch.float64) / half)
    )
    return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_layer_equals_its_equation(h_q, h_kv):
    """A loop over heads and tokens with the layer's weights, cut into W_Q, W_K and W_V by hand."""
    attention, x = layer(h_q, h_kv), inputs()[0]
    d_h = 4
    weights = attention.qkv.weight
    w_q, w_k, w_v = weights.split([h_q * d_h, h_kv * d_h, h_kv * d_h])
    rows = []
    for t in range(len(x)):
        heads = []
        for i in range(h_q):
            g = math.floor(i * h_kv / h_q)
            own, shared = slice(i * d_h, (i + 1) * d_h), slice(g * d_h, (g + 1) * d_h)
            q = turn(w_q[own] @ x[t], t)
            scores = [q @ turn(w_k[shared] @ x[s], s) / math.sqrt(d_h) for s in range(t + 1)]
            a = torch.stack(scores).softmax(0)
            heads.append(sum(a[s] * (w_v[shared] @ x[s]) for s in range(t + 1)))
        rows.append(attention.out.weight @ torch.cat(heads) + attention.out.bias)
    # the library's angles are float32, whose rounding reaches 1e-7 of a radian
    torch.testing.assert_close(attention(x[None])[0][0], torch.stack(rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_layer_is_grouped_query_attention_with_a_free_head_width(h_q, h_kv):
    """torch's own multi-head attention has no groups and no free width: check with its operator."""
    attention, x = layer(h_q, h_kv, rope_base=0.0), inputs()
    q, k, v = attention.qkv(x).split([4 * h_q, 4 * h_kv, 4 * h_kv], -1)
    q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
    k, v = (y.repeat_interleave(h_q // h_kv, 1) for y in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.out(o), atol=1e-12, rtol=0)


def test_all_heads_are_multi_head_attention():
    """H_q = H_kv = H, without positions: torch's `MultiheadAttention` with the same weights."""
    attention, x = layer(8, 8, rope_base=0.0), inputs()
    other = nn.MultiheadAttention(32, 8, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(attention.qkv.weight)
        other.out_proj.weight.copy_(attention.out.weight)
        other.out_proj.bias.copy_(attention.out.bias)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    expected = other(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(attention(x)[0], expected, atol=1e-12, rtol=0)


def without_last_heads(attention, keep, d_h=4, h=8):
    """GQA with the first `keep` query heads only: their rows of W_Q, their columns of W_O."""
    groups = attention.heads[1] * keep // h
    torch.manual_seed(1)
    left = Attention(32, keep, n_kv_heads=groups, d_head=d_h, out_bias=True).double()
    w_q, w_k, w_v = attention.qkv.weight.unflatten(0, (-1, d_h)).split(attention.heads)
    with torch.no_grad():
        left.qkv.weight.copy_(torch.cat([w_q[:keep], w_k[:groups], w_v[:groups]]).flatten(0, 1))
        left.out.weight.copy_(attention.out.weight[:, : keep * d_h])
        left.out.bias.copy_(attention.out.bias)
    return left


def test_deleting_output_columns_of_gqa_gives_sqa_and_zeroing_queries_does_not():
    gqa, x = layer(8, 4), inputs()
    sqa = without_last_heads(gqa, 4)(x)[0]
    with torch.no_grad():
        gqa.qkv.weight[4 * 4 : 8 * 4] = 0  # queries of heads 4 to 7
    uniform = gqa(x)[0]
    v = gqa.qkv(x).unflatten(-1, (-1, 4))[:, :, 12:]  # (B, T, 4, d_h)
    mean = v.cumsum(1) / torch.arange(1, 8).view(1, -1, 1, 1)
    added = mean[:, :, [2, 2, 3, 3]].flatten(2) @ gqa.out.weight[:, 16:].T
    torch.testing.assert_close(uniform, sqa + added, atol=1e-12, rtol=0)
    assert (uniform - sqa).abs().max() > 0.05
    with torch.no_grad():
        gqa.out.weight[:, 16:] = 0
    torch.testing.assert_close(gqa(x)[0], sqa, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", COUNTS)
def test_width_of_a_head_is_that_of_all_heads(name):
    with torch.device("meta"):
        mixer = models.create(f"sqa_{name}", n_layers=1).blocks[0].mixer
    h_q, h_kv = mixer.heads[:2]
    assert mixer.out.weight.shape == (256, 16 * h_q)
    assert mixer.qkv.weight.shape == (16 * (h_q + 2 * h_kv), 256)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("length", [64, 512])
def test_flops_are_those_of_the_formula(name, length):
    settings = models.config(f"sqa_{name}")
    with torch.device("meta"):
        found = measure.flops(SparseQueryAttention(settings), torch.zeros(1, length, 256))
    assert found == sum(attention_flops(settings, length))


@pytest.mark.parametrize("h_kv", [1, 2, 4])
def test_scores_cost_the_share_of_query_heads_whatever_the_keys(h_kv):
    def core(h_q, h_kv):
        with torch.device("meta"):
            q, k = torch.zeros(1, 64, h_q, 16), torch.zeros(1, 64, h_kv, 16)
            return measure.flops(softmax_attention, q, k, k, causal=True)

    assert core(4, h_kv) / core(16, 16) == 4 / 16


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_cache_depends_on_the_key_heads_alone(h_q, h_kv):
    keys, values = layer(h_q, h_kv)(inputs())[1]
    assert keys.shape == values.shape == (2, 7, h_kv, 4)


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_segments_with_carried_states_equal_the_whole(h_q, h_kv):
    model, x = lm(h_q, h_kv), tokens()
    first, states = model.continue_from(x[:, :6], None)
    steps = []
    for t in range(6, 14):
        logits, states = model.continue_from(x[:, t : t + 1], states)
        steps.append(logits)
    torch.testing.assert_close(torch.cat([first, *steps], 1), model(x), atol=1e-10, rtol=0)


def test_logits_do_not_see_the_future():
    model, x = lm(), tokens()
    other = x.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :9], model(x)[:, :9], atol=0, rtol=0)
    assert (model(other)[:, 9:] - model(x)[:, 9:]).abs().min() > 0


def test_model_equals_its_blocks_written_out():
    """Pre-norm, SwiGLU with biases, no norm before the head."""
    model, x = lm(), tokens()
    y = model.embedding(x)
    for block in model.blocks:
        y = y + block.mixer(F.rms_norm(y, (32,), block.mixer_norm.weight, 1e-6))[0]
        z = F.rms_norm(y, (32,), block.ffn_norm.weight, 1e-6)
        left, gate = block.ffn.up, block.ffn.gate
        z = (z @ left.weight.T + left.bias) * F.silu(z @ gate.weight.T + gate.bias)
        y = y + z @ block.ffn.down.weight.T + block.ffn.down.bias
    torch.testing.assert_close(model(x), y @ model.head.weight.T + model.head.bias)


def test_every_parameter_gets_a_gradient():
    model, x = lm(), tokens()
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_torchs():
    model = SQALanguageModel(dataclasses.replace(SMALL, d_model=256, n_layers=1))
    weights = model.blocks[0].mixer.qkv.weight
    assert weights.abs().max() <= 256**-0.5
    assert weights.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_query_heads": 9, "n_kv_heads": 1},
        {"n_query_heads": 2, "n_kv_heads": 4},
        {"n_query_heads": 4, "n_kv_heads": 3},
        {"n_query_heads": 4, "n_kv_heads": 0},
        {"n_heads": 6, "n_query_heads": 3, "n_kv_heads": 1},
    ],
)
def test_heads_that_do_not_fit_raise(changes):
    with pytest.raises(ValueError, match="n_heads divides d_model; got "):
        dataclasses.replace(SMALL, **changes)
