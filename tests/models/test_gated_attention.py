"""Gated attention: counts at the paper's sizes, the gate's identities, oracles, decoding."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.models.gated_attention import (
    Gate,
    GatedAttention,
    GatedAttentionConfig,
    GatedAttentionModel,
    SparseSwiGLU,
)

SMALL = GatedAttentionConfig(
    vocab_size=11, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=20
)
GATES = {
    "none": {"gate": "none"},
    "elementwise": {},
    "headwise": {"gate": "headwise"},
    "shared": {"gate": "shared"},
    "fixed": {"gate": "fixed"},
    "norm": {"gate": "norm"},
    "silu": {"gate": "silu"},
    "non-sparse": {"form": "non-sparse"},
    "additive": {"form": "additive"},
    "G2": {"position": "G2"},
    "G2 headwise": {"position": "G2", "gate": "headwise"},
    "G3": {"position": "G3"},
    "G4": {"position": "G4"},
    "G5": {"position": "G5"},
}


def layer(**changes):
    torch.manual_seed(0)
    made = GatedAttention(dataclasses.replace(SMALL, **changes)).double()
    with torch.no_grad():  # norms that do something, and gates far from one half
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif "gate" in name:
                parameter.normal_()
    return made


def small(**changes):
    torch.manual_seed(0)
    return GatedAttentionModel(dataclasses.replace(SMALL, init_std=0.3, **changes)).double()


def inputs(length=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 12, generator=generator, dtype=torch.float64)


def tokens(length=20):
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gated_attention_1.7b", 1_720_574_976),
        ("gated_attention_1.7b_48l", 1_705_735_680),
        ("gated_attention_15a2b", 15_577_227_264),
    ],
)
def test_parameters_of_the_baselines(name, expected):
    """Written out: embedding, projections, feed-forward networks, router, norms."""
    c = models.config(name, gate="none")
    ffn = 3 * c.d_model * c.d_ff
    if c.n_experts:
        ffn = c.n_experts * ffn + c.d_model * c.n_experts
    attention = 2 * c.d_model * c.d_head * (c.n_heads + c.n_kv_heads)
    norms = 2 * c.d_model + 2 * c.d_head
    whole = c.n_layers * (attention + ffn + norms) + c.d_model
    whole += c.vocab_size * c.d_model * (1 if c.tied else 2)
    with torch.device("meta"):
        found = measure.parameters(models.create(name, gate="none"))
    assert found == whole
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({}, 201_326_592),
        ({"gate": "shared"}, 201_326_592),
        ({"gate": "headwise"}, 1_572_864),
        ({"position": "G2"}, 25_165_824),
        ({"position": "G2", "gate": "headwise"}, 196_608),
        ({"position": "G5"}, 100_663_296),
        ({"gate": "fixed"}, 98_304),
        ({"gate": "norm"}, 3_072),
        ({"gate": "silu"}, 0),
    ],
)
def test_added_parameters_of_the_15a2b_model(changes, added):
    """The paper's 201M, 25M and 1.6M; the others from the shapes."""
    c = models.config("gated_attention_15a2b", **changes)
    plain = dataclasses.replace(c, gate="none", form="sigmoid")
    with torch.device("meta"):
        counts = [measure.parameters(GatedAttention(x)) for x in (c, plain)]
    assert 24 * (counts[0] - counts[1]) == added


# ---------------------------------------------------------------- the gate


def test_zero_gate_weights_halve_the_output():
    made, x = layer(), inputs()
    plain = layer(gate="none")
    plain.load_state_dict(made.state_dict(), strict=False)
    with torch.no_grad():
        made.gate.proj.weight.zero_()
        plain.out.weight /= 2
    torch.testing.assert_close(made(x)[0], plain(x)[0], atol=1e-12, rtol=0)


def test_a_gate_forced_to_one_is_plain_attention():
    made, x = layer(), inputs().abs()
    plain = layer(gate="none")
    plain.load_state_dict(made.state_dict(), strict=False)
    with torch.no_grad():
        made.gate.proj.weight.fill_(100.0)
    torch.testing.assert_close(made(x)[0], plain(x)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("position", ["G1", "G2"])
def test_headwise_is_elementwise_with_equal_columns(position):
    heads, x = layer(gate="headwise", position=position), inputs()
    wide = layer(position=position)
    state = heads.state_dict()
    state["gate.proj.weight"] = state["gate.proj.weight"].repeat_interleave(6, 0)
    wide.load_state_dict(state)
    torch.testing.assert_close(wide(x)[0], heads(x)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [n for n in GATES if n not in ("none", "norm", "silu")])
def test_scores_are_what_the_tables_say(name):
    """Each score from one dot product, in loops; then the range of its form."""
    made, x = layer(**GATES[name]), inputs(3)
    gate, c = made.gate, dataclasses.replace(SMALL, **GATES[name])
    scores = gate.scores(x)
    n_heads, width = {"G5": (1, 12), "G2": (2, 6), "G3": (2, 6)}.get(c.position, (4, 6))
    for b in range(2):
        for t in range(3):
            rows = []
            for h in range(n_heads):
                if c.gate == "fixed":
                    logits = gate.table[h]
                elif c.gate == "headwise":
                    logits = (gate.proj.weight[h] @ x[b, t]).expand(1)
                else:
                    logits = gate.proj.weight[h * width : (h + 1) * width] @ x[b, t]
                sigma = 1 / (1 + torch.exp(-logits))
                rows.append(
                    {"sigmoid": sigma, "non-sparse": 0.5 + 0.5 * sigma, "additive": logits * sigma}[
                        c.form
                    ]
                )
            expected = torch.stack(rows)
            if c.gate == "shared":
                expected = expected.mean(0, keepdim=True)
            found = scores if c.gate == "fixed" else scores[b, t]
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    if c.form == "non-sparse":
        assert scores.min() >= 0.5
        assert scores.max() <= 1


def test_fixed_gate_starts_at_one_half():
    gate = Gate(dataclasses.replace(SMALL, gate="fixed"), 4, 6)
    assert torch.equal(gate.scores(inputs().float()), torch.full((4, 6), 0.5))


# ---------------------------------------------------------------- the layer


def turned(x, position, base=10_000.0):
    """RoPE on one vector, pair by pair."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position * base ** (-i / half)
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def normed(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def by_hand(made, x, c):
    """One sequence `[T, D]` through the layer, from the equations, in loops."""

    def gated(position, y, t, head, heads):
        """y `[K]` of one head and token."""
        if c.gate == "none" or c.position != position:
            return y
        if c.gate == "norm":
            return normed(y, made.gate.norm.weight)
        if c.gate == "silu":
            return y / (1 + torch.exp(-y))
        scores = made.gate.scores(x[None])  # tested above against its own loops
        row = scores if c.gate == "fixed" else scores[0, t]
        row = row.expand(heads, -1)[head]
        return y + row if c.form == "additive" else y * row

    rows = []
    for t in range(len(x)):
        joined = []
        for h in range(4):
            g = h // 2  # two query heads read one key head
            mine, its = slice(6 * h, 6 * h + 6), slice(6 * g, 6 * g + 6)
            q = gated("G4", made.query.weight[mine] @ x[t], t, h, 4)
            q = turned(normed(q, made.query_norm.weight), t)
            scores, values = [], []
            for j in range(t + 1):
                k = gated("G3", made.key.weight[its] @ x[j], j, g, 2)
                k = turned(normed(k, made.key_norm.weight), j)
                scores.append(q @ k / math.sqrt(6))
                values.append(gated("G2", made.value.weight[its] @ x[j], j, g, 2))
            p = torch.stack(scores).exp()
            y = (p[:, None] * torch.stack(values)).sum(0) / p.sum()
            joined.append(gated("G1", y, t, h, 4))
        rows.append(gated("G5", made.out.weight @ torch.cat(joined), t, 0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", GATES)
def test_layer_equals_its_equations(name):
    made, x = layer(**GATES[name]), inputs(5)
    expected = by_hand(made, x[0], dataclasses.replace(SMALL, **GATES[name]))
    torch.testing.assert_close(made(x)[0][0], expected, atol=1e-7, rtol=0)  # angles are float32


def test_value_gate_acts_before_the_sum_over_keys():
    """Gating at G2 is plain attention over values that were gated beforehand."""
    made, x = layer(position="G2"), inputs()
    weights = made.weights(x)
    v = made.value(x).unflatten(-1, (2, 6)) * made.gate.scores(x)
    y = torch.einsum("bhts,bshk->bthk", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(made(x)[0], made.out(y.flatten(-2)), atol=1e-12, rtol=0)


def test_headwise_output_gate_commutes_with_the_sum_over_keys():
    """Scaling a query's attention row is the same as scaling its output."""
    made, x = layer(gate="headwise"), inputs()
    row = made.gate.scores(x).squeeze(-1).mT.unsqueeze(-1)  # (B, H, T, 1)
    v = made.value(x).unflatten(-1, (2, 6)).repeat_interleave(2, 2)
    y = torch.einsum("bhts,bshk->bthk", row * made.weights(x), v)
    torch.testing.assert_close(made(x)[0], made.out(y.flatten(-2)), atol=1e-12, rtol=0)


def test_norm_cancels_a_common_factor_on_queries():
    """Why a headwise gate at G3 or G4 is refused: equal scores in a head change nothing."""
    made, x = layer(position="G4"), inputs()
    made.query_norm.eps = 0.0
    before = layer(gate="none")
    before.query_norm.eps = 0.0
    before.load_state_dict(made.state_dict(), strict=False)
    with torch.no_grad():
        made.gate.proj.weight.copy_(made.gate.proj.weight[::6].repeat_interleave(6, 0))
    torch.testing.assert_close(made(x)[0], before(x)[0], atol=1e-12, rtol=0)


def test_gate_fused_into_the_query_projection_as_in_the_release():
    """Rows of one matrix, for each key head: its queries, then their gates."""
    made, x = layer(), inputs()
    groups = zip(made.query.weight.split(12), made.gate.proj.weight.split(12), strict=True)
    fused = torch.cat([torch.cat(pair) for pair in groups])  # (2 H K, D)
    both = (x @ fused.T).unflatten(-1, (2, 24))  # (B, T, G, 2 · H/G · K)
    q, gate = (part.flatten(-2) for part in both.split(12, -1))
    torch.testing.assert_close(q, made.query(x))
    torch.testing.assert_close(gate.sigmoid().unflatten(-1, (4, 6)), made.gate.scores(x))


def test_gate_reads_the_normed_input_of_the_block():
    model, x = small(), tokens()
    block = model.blocks[0]
    found = next(model.look(x))
    normed_input = block.mixer_norm(model.embedding(x))
    torch.testing.assert_close(found.scores, block.mixer.gate.scores(normed_input))
    scaled = small()
    with torch.no_grad():
        scaled.embedding.weight *= 7
    scaled.blocks[0].mixer_norm.eps = block.mixer_norm.eps = 0.0
    torch.testing.assert_close(next(scaled.look(x)).scores, next(model.look(x)).scores)


def test_a_mixture_of_experts_equals_its_loop():
    torch.manual_seed(0)
    made = SparseSwiGLU(12, 5, 6, 2).double()
    x = inputs(4)
    y = made(x)
    for b in range(2):
        for t in range(4):
            p = made.router(x[b, t]).softmax(-1)
            best = p.argsort(descending=True)[:2].tolist()
            expected = sum(p[e] * made.experts[e](x[b, t]) for e in best) / p[best].sum()
            torch.testing.assert_close(y[b, t], expected, atol=1e-12, rtol=0)


def test_a_model_with_experts_is_initialised_and_trains():
    torch.manual_seed(0)
    model = GatedAttentionModel(
        dataclasses.replace(SMALL, d_model=128, n_experts=4, n_active=2, tied=False, init_std=0.1)
    )
    spread = model.blocks[1].ffn.experts[3].up.weight.std().item()
    assert spread == pytest.approx(0.1, rel=0.1)
    x = tokens(30)
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("name", GATES)
def test_segments_with_carried_states_equal_the_whole(name):
    model, x = small(**GATES[name]), tokens()
    first, states = model.continue_from(x[:, :7], None)
    parts = [first]
    for t in range(7, 20):  # token by token, as in decoding
        part, states = model.continue_from(x[:, t : t + 1], states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", GATES)
def test_logits_do_not_see_the_future(name):
    model, x = small(**GATES[name]), tokens()
    other = x.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :12], model(x)[:, :12], atol=0, rtol=0)
    assert (model(other)[:, 12:] - model(x)[:, 12:]).abs().min() > 0


@pytest.mark.parametrize("name", GATES)
def test_every_parameter_gets_a_gradient(name):
    model, x = small(**GATES[name]), tokens()
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.abs().max() > 0, label


def test_look_shows_weights_scores_and_outputs_of_every_block():
    model, x = small(), tokens()
    seen = list(model.look(x))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0].weights.sum(-1), torch.ones(2, 4, 20, dtype=torch.double))
    assert seen[0].weights.triu(1).abs().max() == 0
    torch.testing.assert_close(model.head(model.norm(seen[-1].hidden)), model(x))
    assert next(small(gate="none").look(x)).scores is None
    assert next(small(gate="norm").look(x)).scores is None


def test_gates_start_near_one_half():
    torch.manual_seed(0)
    model = GatedAttentionModel(dataclasses.replace(SMALL, d_model=64, d_head=16))
    scores = next(model.look(tokens())).scores
    assert scores.mean().item() == pytest.approx(0.5, abs=0.02)
    assert scores.std().item() == pytest.approx(0.25 * 0.02 * 8, rel=0.3)


def test_a_tied_head_is_the_embedding():
    model = small()
    assert model.head.weight is model.embedding.weight
    assert small(tied=False).head.weight.data_ptr() != model.embedding.weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "vector"}, "gate must be one of none, elementwise"),
        ({"form": "tanh"}, "form must be one of sigmoid, non-sparse, additive"),
        ({"position": "G6"}, "position must be one of G1, G2"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"gate": "fixed", "form": "additive"}, "has one form, sigmoid"),
        ({"gate": "headwise", "position": "G4"}, "cancelled by the norm"),
        ({"n_experts": 4}, "n_active must be 1 to n_experts; got 8"),
    ],
)
def test_settings_that_make_no_sense_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
