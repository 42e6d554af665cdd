"""The properties of arXiv:2509.00605 that pin an implementation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from gatebook.models import gam, gam_baselines
from gatebook.models.gam import GAM, GAMConfig, GAMLanguageModel
from gatebook.models.gam_baselines import MambaConfig, TransformerConfig

SMALL = GAMConfig(
    vocab_size=16, context=40, d_model=12, n_layers=6, n_slots=10, dropout=0.0, init="small"
)

MODELS = gam.MODELS | gam_baselines.MODELS


def build(name, **overrides):
    cls, config = MODELS[name]
    with torch.device("meta"):
        return cls(dataclasses.replace(config, **overrides))


def small_model(seed=0, **overrides):
    torch.manual_seed(seed)
    return GAMLanguageModel(dataclasses.replace(SMALL, **overrides)).double().eval()


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


# Sizes


@pytest.mark.parametrize(
    ("name", "expected"), [("gam", 22_599_680), ("gam_transformer", 24_166_400)]
)
def test_parameter_count_is_the_papers(name, expected):
    assert n_parameters(build(name)) == expected


def test_mamba_baseline_has_the_papers_20_5_million_parameters():
    assert round(n_parameters(build("gam_mamba")) / 1e6, 1) == 20.5


def test_block_breakdown_is_the_papers():
    model = build("gam")
    block = model.blocks[0]
    assert n_parameters(block) == 2_891_264
    assert block.mixer.global_path.bank.numel() == 262_144
    assert n_parameters(block.mixer.local_path) == 2_048
    assert n_parameters(block.mixer.gate) == 525_312
    assert n_parameters(block.ffn) == 2_099_712
    assert n_parameters(block.norm1) + n_parameters(block.norm2) == 2_048
    assert n_parameters(model.embedding) == 5_251_072
    assert n_parameters(model.norm) == 1_024


def test_output_matrix_is_the_token_embedding():
    model = small_model()
    features = model.trunk(model.embedding(torch.zeros(1, 5, dtype=torch.long)))
    expected = torch.einsum("btd,vd->btv", features, model.embedding.token.weight)
    assert torch.allclose(model.logits(features), expected, rtol=0, atol=1e-14)


# Equations


def test_local_path_is_the_sum_over_the_last_taps():
    torch.manual_seed(1)
    path = gam.LocalPath(5, 3).double()
    u = torch.randn(2, 7, 5, dtype=torch.double)
    weight = path.conv.weight[:, 0]  # (D, K)
    for t in range(7):
        expected = path.conv.bias.clone().expand(2, 5)
        for i in range(min(3, t + 1)):
            expected = expected + weight[:, 2 - i] * u[:, t - i]
        assert torch.allclose(path(u)[:, t], expected, rtol=0, atol=1e-12)


def test_local_path_is_the_released_padding_and_truncation():
    torch.manual_seed(1)
    path = gam.LocalPath(5, 3).double()
    u = torch.randn(2, 7, 5, dtype=torch.double)
    both_sides = F.conv1d(u.mT, path.conv.weight, path.conv.bias, padding=2, groups=5)
    assert torch.allclose(path(u), both_sides[:, :, :7].mT, rtol=0, atol=1e-12)


def test_global_path_reads_one_position_through_a_softmax_over_slots():
    torch.manual_seed(1)
    path = gam.GlobalPath(5, 4).double()
    u = torch.randn(2, 3, 5, dtype=torch.double)
    bank = path.bank.detach()
    for b in range(2):
        for t in range(3):
            score = [math.exp(float(u[b, t] @ slot)) for slot in bank]
            expected = sum(s * slot for s, slot in zip(score, bank, strict=True)) / sum(score)
            assert torch.allclose(path(u)[b, t], expected, rtol=0, atol=1e-12)


def test_global_path_commutes_with_shuffling_the_positions():
    torch.manual_seed(1)
    path = gam.GlobalPath(5, 4)
    u, order = torch.randn(1, 9, 5), torch.randperm(9)
    assert torch.allclose(path(u)[:, order], path(u[:, order]), atol=1e-6)


def test_global_read_lies_in_the_convex_hull_of_the_slots():
    torch.manual_seed(1)
    path = gam.GlobalPath(2, 30).double()
    m = path(3 * torch.randn(1, 50, 2, dtype=torch.double))[0]
    angles = torch.arange(0, 2 * math.pi, 0.1, dtype=torch.double)
    directions = torch.stack([angles.cos(), angles.sin()])  # supporting lines of a plane set
    assert (m @ directions <= (path.bank @ directions).amax(0) + 1e-12).all()


def test_scaling_the_bank_sharpens_the_softmax_and_scales_the_value():
    torch.manual_seed(1)
    path = gam.GlobalPath(4, 6).double()
    u, bank = torch.randn(1, 3, 4, dtype=torch.double), path.bank.detach().clone()
    path.bank.data = 2 * bank
    expected = 2 * torch.softmax(2 * u @ bank.T, -1) @ bank
    assert torch.allclose(path(u), expected, rtol=0, atol=1e-12)


def test_one_slot_is_a_constant_vector():
    torch.manual_seed(1)
    path = gam.GlobalPath(5, 1)
    m = path(torch.randn(2, 7, 5))
    assert torch.equal(m, path.bank[0].expand(2, 7, 5))


@pytest.mark.parametrize(
    ("closed", "remaining"), [("global", "local_path"), ("local", "global_path")]
)
def test_a_closed_gate_leaves_the_other_path(closed, remaining):
    torch.manual_seed(1)
    mixer = GAM(SMALL).double()
    d = SMALL.d_model
    rows = slice(d, 2 * d) if closed == "global" else slice(0, d)
    mixer.gate.weight.data[rows], mixer.gate.bias.data[rows] = 0.0, -1e4
    u = torch.randn(2, 9, d, dtype=torch.double)
    gates = torch.sigmoid(mixer.gate(u)).chunk(2, -1)
    expected = gates[closed == "local"] * getattr(mixer, remaining)(u)
    assert torch.allclose(mixer(u), expected, rtol=0, atol=1e-12)


def test_open_gates_leave_the_sum_of_the_paths():
    torch.manual_seed(1)
    gated = GAM(SMALL).double()
    summed = GAM(dataclasses.replace(SMALL, paths="sum")).double()
    gated.gate.weight.data.zero_()
    gated.gate.bias.data.fill_(1e4)
    summed.load_state_dict(
        {k: v for k, v in gated.state_dict().items() if not k.startswith("gate.")}
    )
    u = torch.randn(2, 9, SMALL.d_model, dtype=torch.double)
    assert torch.allclose(gated(u), summed(u), rtol=0, atol=1e-12)


def test_local_gate_closed_is_a_per_token_network():
    model = small_model()
    for block in model.blocks:
        block.mixer.gate.weight.data[: SMALL.d_model] = 0.0
        block.mixer.gate.bias.data[: SMALL.d_model] = -1e4
    tokens = torch.randint(16, (1, 20))
    changed = tokens.clone()
    changed[:, :19] = torch.randint(16, (1, 19))
    assert torch.equal(model(tokens)[:, 19], model(changed)[:, 19])


# Causality and reach


@pytest.mark.parametrize("name", list(MODELS))
def test_changing_a_token_leaves_earlier_outputs_bit_identical(name):
    torch.manual_seed(2)
    cls, config = MODELS[name]
    model = cls(dataclasses.replace(config, vocab_size=50, context=24, d_model=32, n_layers=2))
    model.eval()
    tokens = torch.randint(50, (2, 24))
    before = model(tokens)
    for j in (0, 11, 23):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 1) % 50
        after = model(changed)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


@pytest.mark.parametrize(("layers", "taps"), [(6, 3), (1, 3), (2, 5), (3, 2), (4, 1)])
def test_receptive_field_by_perturbation(layers, taps):
    model = small_model(n_layers=layers, kernel_size=taps)
    tokens = torch.randint(16, (1, 40))
    last = model(tokens)[0, -1]
    read = []
    for j in range(40):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % 16
        read.append(not torch.equal(model(changed)[0, -1], last))
    reach = 1 + layers * (taps - 1)
    assert model.receptive_field == reach
    assert read == [False] * (40 - reach) + [True] * reach


@pytest.mark.parametrize(("layers", "taps"), [(6, 3), (1, 3), (2, 5), (3, 2), (4, 1)])
def test_receptive_field_by_gradient(layers, taps):
    model = small_model(n_layers=layers, kernel_size=taps)
    x = torch.randn(1, 40, 12, dtype=torch.double, requires_grad=True)
    y = x
    for block in model.blocks:
        y = block(y)
    y[0, -1].square().sum().backward()
    read = (x.grad[0] != 0).any(-1)
    assert int(read.sum()) == 1 + layers * (taps - 1)
    assert read[-int(read.sum()) :].all()


def test_global_only_reads_the_current_token_alone():
    model = small_model(paths="global")
    tokens = torch.randint(16, (1, 40))
    changed = torch.randint(16, (1, 40))
    changed[:, 7] = tokens[:, 7]
    assert model.receptive_field == 1
    assert torch.equal(model(changed)[:, 7], model(tokens)[:, 7])


# Decoding


@pytest.mark.parametrize("paths", ["gated", "sum", "local", "global"])
def test_decoding_with_a_two_token_buffer_equals_the_full_forward(paths):
    model = small_model(paths=paths)
    tokens = torch.randint(16, (3, 40))
    buffers = model.empty_buffers(3)
    assert [tuple(b.shape) for b in buffers] == [(3, 2, 12)] * 6
    outputs = []
    for t in range(40):
        logits, buffers = model.step(tokens[:, t], buffers, t)
        outputs.append(logits)
    assert [tuple(b.shape) for b in buffers] == [(3, 2, 12)] * 6
    assert torch.allclose(torch.stack(outputs, 1), model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", [0, 40])
def test_positions_past_the_table_are_refused(start):
    model = small_model()
    with pytest.raises(ValueError, match="41 positions, the table has 40"):
        model.embedding(torch.zeros(1, 41 - start, dtype=torch.long), start=start)


def test_a_model_without_positions_takes_any_length():
    model = small_model(context=0)
    assert model(torch.zeros(1, 300, dtype=torch.long)).shape == (1, 300, 16)


# Initialisation


@pytest.mark.parametrize("config_class", [GAMConfig, TransformerConfig, MambaConfig])
def test_released_initialisation_drowns_the_token_in_its_position(config_class):
    torch.manual_seed(3)
    embedding = gam.Embedding(config_class(vocab_size=2000))
    bound = 512**-0.5
    assert embedding.token.weight.abs().max() <= bound
    assert embedding.token.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert embedding.position.weight.std().item() == pytest.approx(1.0, rel=0.02)
    ratio = embedding.position.weight.std() / embedding.token.weight.std()
    assert 38 < ratio < 41


def test_small_initialisation_gives_both_tables_one_scale():
    torch.manual_seed(3)
    embedding = gam.Embedding(GAMConfig(vocab_size=2000, init="small"))
    for table in (embedding.token, embedding.position):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_bank_is_xavier_uniform():
    torch.manual_seed(3)
    bank = gam.GlobalPath(512, 512).bank
    bound = math.sqrt(6 / (512 + 512))
    assert bound * 0.999 < bank.abs().max() <= bound


@pytest.mark.parametrize("field", ["paths", "init"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(ValueError, match="'nothing' is not one of"):
        GAMLanguageModel(dataclasses.replace(SMALL, **{field: "nothing"}))


# Baselines and the head of the copying task


def test_lag_reader_keeps_the_receptive_field():
    reader = gam.LagReader(small_model().float(), 3)
    tokens = torch.randint(16, (1, 40))
    changed = tokens.clone()
    changed[0, :27] = (changed[0, :27] + 1) % 16
    assert reader(tokens).shape == (1, 40, 3, 16)
    assert torch.equal(reader(tokens)[0, 39], reader(changed)[0, 39])


def test_materialised_attention_equals_the_fused_kernel():
    torch.manual_seed(4)
    config = TransformerConfig(vocab_size=16, context=40, d_model=32, n_layers=2, dropout=0.0)
    fused = gam_baselines.Transformer(config).double()
    written = gam_baselines.Transformer(dataclasses.replace(config, materialise=True)).double()
    written.load_state_dict(fused.state_dict())
    tokens = torch.randint(16, (2, 40))
    assert torch.allclose(fused(tokens), written(tokens), rtol=0, atol=1e-12)


def test_selective_scan_equals_the_unrolled_sum():
    torch.manual_seed(5)
    length, inner, state = 6, 3, 2
    x, dt = torch.randn(1, length, inner), torch.rand(1, length, inner)
    a, b, c = -torch.rand(inner, state), *torch.randn(2, 1, length, state)
    x, dt, a, b, c = (tensor.double() for tensor in (x, dt, a, b, c))
    got = gam_baselines.selective_scan(x, dt, a, b, c)
    for t in range(length):
        expected = torch.zeros(inner, dtype=torch.double)
        for s in range(t + 1):
            decay = torch.exp(dt[0, s + 1 : t + 1].sum(0)[:, None] * a)  # (I, N)
            expected += (decay * b[0, s] * c[0, t]).sum(-1) * dt[0, s] * x[0, s]
        assert torch.allclose(got[0, t], expected, rtol=0, atol=1e-12)


def test_mamba_step_sizes_start_log_uniform_in_the_published_range():
    torch.manual_seed(6)
    layer = gam_baselines.MambaLayer(MambaConfig())
    dt = F.softplus(layer.dt_proj.bias)
    assert 1e-3 * 0.99 < dt.min() < 1.2e-3
    assert 0.09 < dt.max() < 0.1 * 1.01
