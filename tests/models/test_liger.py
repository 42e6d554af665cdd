"""Liger: conversion, both branches, gates, carried state, low-rank changes, published counts."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.layers.language import Attention, rotate
from gatebook.models.liger import (
    LigerAttention,
    LigerConfig,
    LigerDecoder,
    LowRank,
    add_low_rank,
    convert,
)

SMALL = LigerConfig(
    vocab_size=11, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, rope_base=100.0,
    window=5,
)  # fmt: skip
VARIANTS = [
    {},
    {"gate": "none"},
    {"gate": "fresh"},
    {"recurrent_share": 0.0},
    {"recurrent_share": 1.0},
    {"window": 1},
    {"mixer": "attention"},
]


def base():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, mixer="attention")
    model = LigerDecoder(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)  # so that attention is not uniform
    return model


def small(**changes):
    return convert(base(), **({"mixer": "liger"} | changes))


def tokens(length=20, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def layer(**changes):
    torch.manual_seed(0)
    mixer = LigerAttention(dataclasses.replace(SMALL, **changes)).double()
    x = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        mixer.qkv.weight.mul_(3.0)
    return mixer, x


def test_layer_equals_its_equations():
    """Token by token and head by head, from the projections."""
    mixer, x = layer()
    q, k, v = mixer.qkv(x[0]).split([24, 12, 12], -1)
    q, k, v = q.view(13, 4, 6), k.view(13, 2, 6), v.view(13, 2, 6)
    turned_q, turned_k = rotate(q[None], 100.0)[0], rotate(k[None], 100.0)[0]
    rows = []
    state = torch.zeros(4, 6, 6, dtype=torch.float64)
    for t in range(13):
        heads = []
        for h in range(4):
            g = h // 2  # the key head of this query head
            alpha = torch.sigmoid(k[t, g]) ** (1 / 16)
            state[h] = torch.diag(alpha) @ state[h] + torch.outer(k[t, g].softmax(-1), v[t, g])
            recurrent = q[t, h].softmax(-1) @ state[h]
            seen = range(max(0, t - 4), t + 1)
            scores = torch.stack([turned_q[t, h] @ turned_k[i, g] for i in seen]) / math.sqrt(6)
            windowed = sum(p * v[i, g] for p, i in zip(scores.softmax(0), seen, strict=True))
            heads.append(0.5 * recurrent + 0.5 * windowed)
        rows.append(mixer.out(torch.cat(heads)))
    out, kept = mixer(x)
    torch.testing.assert_close(out[0], torch.stack(rows), atol=1e-10, rtol=0)
    torch.testing.assert_close(kept.memory[0], state, atol=1e-10, rtol=0)
    assert kept.length == 13
    assert kept.keys.shape == (2, 4, 2, 6)


def test_first_token():
    """g_1 = (φ(q_1) · φ(k_1)) v_1 and ô_1 = v_1."""
    mixer, x = layer()
    q, k, v = mixer.qkv(x[:, :1]).split([24, 12, 12], -1)
    q, k, v = q.unflatten(-1, (4, 6)), k.unflatten(-1, (2, 6)), v.unflatten(-1, (2, 6))
    k, v = (part.repeat_interleave(2, 2) for part in (k, v))
    weight = (q.softmax(-1) * k.softmax(-1)).sum(-1, keepdim=True)
    expected = mixer.out((0.5 * weight * v + 0.5 * v).flatten(-2))
    torch.testing.assert_close(mixer(x[:, :1])[0], expected)
    assert weight.min() > 0
    assert weight.max() <= 1


def test_conversion_keeps_every_weight_and_adds_none():
    before, after = base(), small()
    assert list(before.state_dict()) == list(after.state_dict())
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert measure.parameters(before) == measure.parameters(after)
    after.head.weight.data.zero_()
    assert before.head.weight.abs().max() > 0  # a copy


@pytest.mark.parametrize("length", [3, 5])
def test_with_the_window_alone_a_short_text_gives_what_it_gave_before(length):
    x = tokens(length)
    converted = small(recurrent_share=0.0)
    torch.testing.assert_close(converted(x), base()(x), atol=1e-12, rtol=0)
    longer = tokens(length + 3)
    assert (converted(longer) - base()(longer)).abs().max() > 1e-6
    assert (small()(x) - base()(x)).abs().max() > 1e-3


def test_open_gates_are_linear_attention_with_softmax_features():
    mixer, x = layer(gate="none", recurrent_share=1.0)
    q, k, v = mixer.qkv(x).split([24, 12, 12], -1)
    q, k, v = q.unflatten(-1, (4, 6)), k.unflatten(-1, (2, 6)), v.unflatten(-1, (2, 6))
    k, v = (part.repeat_interleave(2, 2) for part in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q.softmax(-1), k.softmax(-1)).tril()
    expected = mixer.out(torch.einsum("bhts,bshv->bthv", scores, v).flatten(-2))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_gate_of_zero_keys_halves_the_memory_in_sixteen_tokens():
    mixer, x = layer()
    gate = mixer.log_gate(torch.zeros(1, 1, 2, 6), x)
    torch.testing.assert_close(16 * gate, torch.full_like(gate, math.log(0.5)))
    assert gate.dtype == torch.float32
    assert mixer.log_gate(torch.zeros(1, 1, 2, 6, dtype=torch.bfloat16), x).dtype == torch.float32


def test_gate_reads_the_raw_key_of_its_own_head():
    mixer, x = layer()
    k = torch.randn(1, 4, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer.log_gate(k, x), F.logsigmoid(k) / 16)
    fresh, x = layer(gate="fresh")
    expected = F.logsigmoid(fresh.gate(x)).unflatten(-1, (2, 6)) / 16
    torch.testing.assert_close(fresh.log_gate(k, x), expected)


def test_recurrent_branch_ignores_positions_and_the_window_does_not():
    for share, same in ((1.0, True), (0.0, False)):
        mixer, x = layer(recurrent_share=share)
        other = copy.deepcopy(mixer)
        other.base = 10.0
        equal = torch.allclose(mixer(x)[0], other(x)[0], atol=1e-9)
        assert equal == same


@pytest.mark.parametrize("changes", VARIANTS)
def test_segments_with_carried_states_equal_the_whole(changes):
    model, x = small(**changes), tokens()
    parts, states = [], None
    for segment in x.split([7, 1, 1, 1, 10], 1):
        part, states = model.continue_from(segment, states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-10, rtol=0)


def test_state_does_not_grow():
    model = small()
    sizes = []
    for length in (8, 20, 200):
        _, states = model.continue_from(tokens(length), None)
        sizes.append([(s.memory.shape, s.keys.shape, s.values.shape) for s in states])
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_do_not_see_the_future(changes):
    model, x = small(**changes), tokens()
    other = x.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :12], model(x)[:, :12], atol=1e-13, rtol=0)
    assert (model(other)[:, 12:] - model(x)[:, 12:]).abs().min() > 0


def test_window_alone_does_not_see_past_it_and_the_recurrence_does():
    for share, blind in ((0.0, True), (0.5, False)):
        mixer, x = layer(recurrent_share=share)
        other = x.clone()
        other[:, 0] += 1.0
        change = (mixer(other)[0] - mixer(x)[0]).abs().amax((0, 2))
        assert change[4] > 1e-6  # the fifth token sees the first
        assert (change[5] == 0) == blind


def test_low_rank_changes_nothing_at_first_and_trains_alone():
    model, x = small(), tokens()
    before = model(x)
    frozen = {
        n: p for n, p in model.named_parameters() if not n.endswith(("qkv.weight", "out.weight"))
    }
    add_low_rank(model, 3, 6.0)
    torch.testing.assert_close(model(x), before, atol=0, rtol=0)
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for name, parameter in model.named_parameters():
        trained = ".a" in name or ".b" in name
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name
        if ".b" in name:
            assert parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad for p in frozen.values())


def test_low_rank_map_equals_its_equation_and_its_merged_map():
    torch.manual_seed(0)
    linear = nn.Linear(8, 7, bias=False).double()
    weight = linear.weight.detach().clone()
    change = LowRank(linear, [4, 2, 1], rank=2, alpha=6.0)
    for b in change.b:
        nn.init.normal_(b)
    x = torch.randn(5, 8, dtype=torch.float64)
    parts = [3.0 * x @ a.T @ b.T for a, b in zip(change.a, change.b, strict=True)]
    torch.testing.assert_close(change(x), x @ weight.T + torch.cat(parts, -1))
    torch.testing.assert_close(change.merged()(x), change(x))
    assert all(p.requires_grad for p in (change.a, *change.b))


def test_a_fresh_gate_trains_with_the_low_rank_changes():
    model = add_low_rank(small(gate="fresh"), 2)
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    assert model.blocks[0].mixer.gate.weight.grad.abs().max() > 0


def test_every_weight_of_the_converted_model_gets_a_gradient():
    model, x = small(), tokens()
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("liger_llama3_8b", 8_030_261_248),
        ("liger_mistral_7b", 7_241_732_096),
        ("liger_smollm2_135m", 134_515_008),
    ],
)
def test_parameters_are_those_of_the_base(name, count):
    with torch.device("meta"):
        assert measure.parameters(models.create(name)) == count


@pytest.mark.parametrize(("output", "count"), [(False, 4_718_592), (True, 6_815_744)])
@pytest.mark.parametrize("name", ["liger_llama3_8b", "liger_mistral_7b"])
def test_trained_parameters_are_the_papers(name, output, count):
    with torch.device("meta"):
        model = add_low_rank(models.create(name), 8, output=output)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_state_of_a_layer_at_the_papers_size():
    with torch.device("meta"):
        model = models.create("liger_llama3_8b", n_layers=1)
        _, states = model.continue_from(torch.zeros(1, 100, dtype=torch.long), None)
    assert states[0].memory.numel() == 524_288
    assert states[0].keys.shape == (1, 63, 8, 128)


def test_a_fresh_gate_is_the_only_new_weight():
    added = set(small(gate="fresh").state_dict()) - set(base().state_dict())
    assert added == {f"blocks.{i}.mixer.gate.weight" for i in range(2)}
    with pytest.raises(ValueError, match="do not fit"):
        convert(small(gate="fresh"), gate="key")
    with pytest.raises(RuntimeError, match="size mismatch"):
        convert(base(), d_ff=40)
    assert isinstance(convert(small(), mixer="attention").blocks[0].mixer, Attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "gla"}, "mixer must be liger or attention; got 'gla'"),
        ({"gate": "pool"}, "gate must be key, none or fresh; got 'pool'"),
        ({"window": 0}, "got 16.0, 0 and 0.5"),
        ({"tau": 0.0}, "got 0.0, 5 and 0.5"),
        ({"recurrent_share": 1.5}, "got 16.0, 5 and 1.5"),
    ],
)
def test_impossible_configurations_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_a_map_that_low_rank_cannot_take_raises():
    with pytest.raises(ValueError, match="without bias and 7 outputs"):
        LowRank(nn.Linear(8, 7), [4, 3], 2, 2.0)
    with pytest.raises(ValueError, match="without bias and 6 outputs"):
        LowRank(nn.Linear(8, 7, bias=False), [4, 2], 2, 2.0)
