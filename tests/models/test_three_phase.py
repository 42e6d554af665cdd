"""The Three-Phase Transformer: counts, rotation, norm, horn, block, carried state."""

import cmath
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.models.three_phase import (
    PhaseNorm,
    PhaseRotation,
    ThreePhaseBlock,
    ThreePhaseConfig,
    ThreePhaseDecoder,
    set_mean,
)

SMALL = ThreePhaseConfig(vocab_size=11, d_model=24, n_layers=2, d_ff=32, n_heads=6, n_kv_heads=3)
VARIANTS = [
    {},
    {"n_phases": 1},
    {"rotation": "add"},
    {"rotation": "none"},
    {"norm": "global", "horn": False},
    {"norm": "global", "rotation": "none", "horn": False, "scale_embedding": True},
]


def small(**changes):
    torch.manual_seed(0)
    return ThreePhaseDecoder(dataclasses.replace(SMALL, **changes)).double()


def tokens(length=20, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(model):
    """The model with gains and angles away from their start, so that they matter."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("three_phase_123m", 123_490_560),
        ("rope_only_123m", 123_489_024),
        ("three_phase_5m", 5_463_872),
        ("rope_only_5m", 5_463_744),
    ],
)
def test_parameters_are_the_papers(name, count):
    with torch.device("meta"):
        assert measure.parameters(models.create(name)) == count


@pytest.mark.parametrize("phases", [1, 2, 3, 6])
def test_rotation_adds_half_a_phases_width_for_each_layer(phases):
    counts = [measure.parameters(small(n_phases=phases, rotation=r)) for r in ("overwrite", "none")]
    assert counts[0] - counts[1] == SMALL.n_layers * SMALL.d_model // (2 * phases)


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_rotation_equals_its_equation(phases):
    """Pair by pair, with complex numbers."""
    rotation = PhaseRotation(12, phases, 0.4).double()
    with torch.no_grad():
        rotation.theta += torch.arange(len(rotation.theta))
    x = normal(5, 12)
    expected = torch.empty_like(x)
    width = 12 // phases
    for i in range(phases):
        for k in range(width // 2):
            at = i * width + 2 * k
            turn = cmath.exp(1j * (rotation.theta[k].item() + 2 * math.pi * i / phases))
            for row in range(5):
                z = complex(x[row, at], x[row, at + 1]) * turn
                expected[row, at], expected[row, at + 1] = z.real, z.imag
    torch.testing.assert_close(rotation(x), expected, atol=1e-12, rtol=0)


def test_a_quarter_turn_maps_even_channels_to_odd_ones():
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    turned = PhaseRotation(4, 1, math.pi / 2)(x)
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, -2.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_rotation_is_orthogonal_and_not_trivial(phases):
    one = torch.eye(24, dtype=torch.float64)
    matrix = PhaseRotation(24, phases, 0.7).double()(one)
    torch.testing.assert_close(matrix @ matrix.T, one, atol=1e-12, rtol=0)
    assert (matrix - one).abs().max() > 0.1


def test_the_opposite_angle_undoes_a_rotation():
    x = normal(2, 5, 24)
    there, back = (PhaseRotation(24, 1, angle).double() for angle in (0.7, -0.7))
    torch.testing.assert_close(back(there(x)), x)


def test_one_phase_with_angle_zero_is_the_identity():
    x = normal(3, 24)
    assert torch.equal(PhaseRotation(24, 1, 0.0).double()(x), x)
    assert not torch.equal(PhaseRotation(24, 3, 0.0).double()(x), x)


def test_angles_start_at_their_layers_place():
    model = small(n_layers=4)
    for layer, block in enumerate(model.blocks):
        expected = torch.full((4,), (layer + 1) * math.pi / 8, dtype=torch.float64)
        torch.testing.assert_close(block.rotation.theta.detach(), expected, atol=1e-6, rtol=0)
        assert block.rotation.drift() < 1e-6
    with torch.no_grad():
        model.blocks[0].rotation.theta[:2] += 0.5
    assert model.blocks[0].rotation.drift() == pytest.approx(0.25)


def test_phase_norm_is_rms_norm_of_each_phase():
    torch.manual_seed(0)
    norm, x = PhaseNorm(24, 3, 1e-6).double(), normal(4, 24)
    with torch.no_grad():
        norm.weight.normal_()
    parts = [
        part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in x.split(8, dim=-1)
    ]
    torch.testing.assert_close(norm(x), torch.cat(parts, -1) * norm.weight)
    other = x.clone()
    other[:, :8] *= 9.0  # one phase grows, the others must not notice
    torch.testing.assert_close(norm(other)[:, 8:], norm(x)[:, 8:])


def test_one_phase_norm_is_torchs():
    x = normal(4, 24)
    plain = torch.nn.RMSNorm(24, eps=1e-6).double()
    torch.testing.assert_close(PhaseNorm(24, 1, 1e-6).double()(x), plain(x))


def test_with_unit_gains_rotation_and_norm_commute():
    rotation, norm = PhaseRotation(24, 3, 0.7).double(), PhaseNorm(24, 3, 1e-6).double()
    x = normal(4, 24)
    torch.testing.assert_close(rotation(norm(x)), norm(rotation(x)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("phases", [2, 3, 4, 12])
def test_rotation_moves_the_horn_out_of_its_direction(phases):
    ones = torch.ones(24, dtype=torch.float64)
    rotation = PhaseRotation(24, phases, 0.37).double()
    assert (ones @ rotation(ones)).abs() / 24 < 1e-12
    one = PhaseRotation(24, 1, 0.37).double()
    assert (ones @ one(ones)).item() / 24 == pytest.approx(math.cos(0.37), abs=1e-6)


def test_every_nth_rotation_brings_the_horn_back():
    ones, angles = torch.ones(24, dtype=torch.float64), [0.2, 0.5, 0.4]
    h, means = ones, []
    for angle in angles:
        h = PhaseRotation(24, 3, angle).double()(h)
        means.append(h.mean().item())
    assert means == pytest.approx([0.0, 0.0, math.cos(sum(angles))], abs=1e-6)


def test_horn_fixes_the_mean_for_any_weights():
    x, later = small().embed(tokens(1024)), small().embed(tokens(5), first=7)
    expected = 1 / torch.arange(1, 1025, dtype=torch.float64)
    torch.testing.assert_close(x.mean(-1), expected.expand(2, -1), atol=1e-12, rtol=0)
    torch.testing.assert_close(later.mean(-1), expected[7:12].expand(2, -1), atol=1e-12, rtol=0)
    phases = x.unflatten(-1, (3, -1)).mean(-1).sum(-1).mean().item()
    assert phases == pytest.approx(3 * expected.sum().item() / 1024)
    assert phases == pytest.approx(0.0220, abs=5e-5)


def test_horn_changes_the_mean_and_nothing_else():
    x = normal(2, 5, 24)
    torch.testing.assert_close(
        set_mean(x) - set_mean(x).mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    )


def test_embedding_is_multiplied_only_if_asked():
    plain = small(horn=False).embed(tokens())
    scaled = small(horn=False, scale_embedding=True).embed(tokens())
    torch.testing.assert_close(scaled, plain * 24**0.5)


@pytest.mark.parametrize("rotation", ["overwrite", "add", "none"])
def test_block_rotates_between_attention_and_feed_forward(rotation):
    torch.manual_seed(0)
    block = shaken(ThreePhaseBlock(dataclasses.replace(SMALL, rotation=rotation), 1).double())
    h = normal(1, 6, 24)
    y = h + block.mixer(block.mixer_norm(h))[0]
    if rotation != "none":
        a, b = y[..., 0::2], y[..., 1::2]
        angle = torch.cat([block.rotation.theta + 2 * math.pi * i / 3 for i in range(3)])
        turned = torch.empty_like(y)
        turned[..., 0::2] = a * angle.cos() - b * angle.sin()
        turned[..., 1::2] = a * angle.sin() + b * angle.cos()
        y = y + turned if rotation == "add" else turned
    z = block.ffn_norm(y)
    ffn = block.ffn.down(F.silu(block.ffn.gate(z)) * block.ffn.up(z))
    torch.testing.assert_close(block(h)[0], y + ffn, atol=1e-12, rtol=0)


def test_logits_are_the_head_of_the_normed_phases():
    model = shaken(small())
    h = model.embed(tokens())
    for block in model.blocks:
        h, _ = block(h)
    phases = h.unflatten(-1, (3, 8))
    normed = phases / (phases.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (normed.flatten(-2) * model.norm.weight) @ model.head.weight.T
    torch.testing.assert_close(model(tokens()), expected)


def test_baseline_equals_a_plain_decoder():
    """Against the library's decoder, which was tested by itself, with the same weights."""
    from gatebook.layers.language import Attention, Decoder

    model = shaken(small(norm="global", rotation="none", horn=False))
    mixers = [Attention(24, 6, n_kv_heads=3) for _ in range(2)]
    plain = Decoder(vocab_size=11, d_model=24, mixers=mixers, d_ff=32).double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens()), plain(tokens()))


@pytest.mark.parametrize("changes", VARIANTS)
def test_segments_with_carried_states_equal_the_whole(changes):
    model, x = shaken(small(**changes)), tokens()
    first, states = model.continue_from(x[:, :7], None)
    parts = [first]
    for t in range(7, 20):  # token by token, where a horn that restarts at 0 would show
        part, states = model.continue_from(x[:, t : t + 1], states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_do_not_see_the_future(changes):
    model, x = shaken(small(**changes)), tokens()
    other = x.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :12], model(x)[:, :12], atol=0, rtol=0)
    assert (model(other)[:, 12:] - model(x)[:, 12:]).abs().min() > 0


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes):
    model, x = small(**changes), tokens()
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_pytorchs_defaults():
    model = ThreePhaseDecoder(dataclasses.replace(SMALL, d_model=240, vocab_size=500, d_ff=60))
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
    for weight, fan_in in ((model.head.weight, 240), (model.blocks[0].ffn.down.weight, 60)):
        assert weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.01)
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


def test_arms_of_one_seed_start_from_the_same_weights():
    base = small().state_dict()
    for changes in VARIANTS[1:]:
        for name, value in small(**changes).state_dict().items():
            if "theta" not in name:
                assert torch.equal(value, base[name]), (changes, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_phases": 5}, "got 5 and 24"),
        ({"n_phases": 8}, "got 8 and 24"),  # phases of odd width
        ({"n_phases": 0}, "got 0 and 24"),
        ({"norm": "layer"}, "norm must be phase or global; got 'layer'"),
        ({"rotation": "half"}, "rotation must be overwrite, add or none; got 'half'"),
    ],
)
def test_impossible_configurations_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
