"""NiNformer: counts, the gated unit and its controls, what mixes tokens and what does not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.models.ninformer import (
    LocalMLP,
    MixerGatedUnit,
    NiNformer,
    NiNformerBlock,
    NiNformerConfig,
)

SMALL = {"d_model": 6, "hidden": 10, "token_hidden": 7, "depth": 2, "dropout": 0.0}
SMALL |= {"image_size": 6, "patch_size": 2, "n_classes": 3}  # 9 tokens
CONTROLS = ("add", "static", "sigmoid", "none")


def config(**changes):
    return NiNformerConfig(**(SMALL | changes))


def made(kind=NiNformer, **changes):
    torch.manual_seed(0)
    return kind(config(**changes)).double()


def tokens(n=2):
    return torch.randn(n, 9, 6, generator=torch.Generator().manual_seed(1)).double()


# --- counts --------------------------------------------------------------------------------------


def test_parameters_of_the_released_model():
    with torch.device("meta"):
        model = models.create("ninformer")
    block = model.blocks[0]
    assert measure.parameters(model) == 2_652_170
    assert measure.parameters(block) == 659_264
    assert measure.parameters(block.norm) == 512  # once: shared
    assert measure.parameters(block.unit.mix.token_mlp) == 66_112
    inner = (block.unit.mix.token_norm, block.unit.mix.channel_norm)
    assert sum(map(measure.parameters, inner)) == 1_024
    assert measure.parameters(block.unit.mix.channel_mlp) == 262_912
    assert measure.parameters(block.unit.project) == 65_792
    assert measure.parameters(block.ffn) == 262_912


@pytest.mark.parametrize(
    ("name", "whole", "block", "macs"),
    [
        ("ninformer", 2_652_170, 659_264, 54_525_952),
        ("ninformer_mixer", 1_335_306, 330_048, 33_554_432),
        ("ninformer_mixer_8", 2_655_498, 330_048, 33_554_432),
        ("ninformer_vit", None, 527_104, 35_651_584),
        ("ninformer_local_vit", None, 527_104 + 10 * 512, 35_651_584 + 64 * 9 * 512),
    ],
)
def test_blocks_cost_what_the_card_says(name, whole, block, macs):
    with torch.device("meta"):
        model = models.create(name)
        x = torch.empty(1, 64, 256)
    assert whole in (None, measure.parameters(model))
    assert measure.parameters(model.blocks[0]) == block
    assert measure.flops(model.blocks[0], x) == 2 * macs


def test_the_gating_half_is_dearer_than_attention_below_640_tokens():
    """2 N t D + 5 N D² against 4 N D² + 2 N² D multiply-adds: cheaper only for 2 N > 2 t + D."""

    def halves(n):
        side = {"image_size": 4 * n, "patch_size": 4}
        with torch.device("meta"):
            unit = models.create("ninformer", **side).blocks[0].unit
            attention = models.create("ninformer_vit", **side).blocks[0].attention
            x = torch.empty(1, n * n, 256)
        return measure.flops(unit, x), measure.flops(attention, x)

    assert halves(8) == (2 * 37_748_736, 2 * 18_874_368)
    assert halves(25)[0] > halves(25)[1]  # 625 tokens
    assert halves(26)[0] < halves(26)[1]  # 676


# --- the unit ------------------------------------------------------------------------------------


def gated(unit, z):
    """The unit by loops over tokens and channels."""
    p, mix = unit.project, unit.mix
    m = z.clone()
    for c in range(6):
        column = F.layer_norm(z, (6,), mix.token_norm.weight, mix.token_norm.bias)[:, :, c]
        hidden = F.gelu(column @ mix.token_mlp[0].weight.T + mix.token_mlp[0].bias)
        m[:, :, c] += hidden @ mix.token_mlp[2].weight.T + mix.token_mlp[2].bias
    out = torch.empty_like(z)
    for i in range(9):
        normed = F.layer_norm(m[:, i], (6,), mix.channel_norm.weight, mix.channel_norm.bias)
        hidden = F.gelu(normed @ mix.channel_mlp[0].weight.T + mix.channel_mlp[0].bias)
        gate = m[:, i] + hidden @ mix.channel_mlp[2].weight.T + mix.channel_mlp[2].bias
        out[:, i] = (z[:, i] @ p.weight.T + p.bias) * gate
    return out


def test_the_unit_is_its_equation():
    unit, z = made(MixerGatedUnit), tokens()
    torch.testing.assert_close(unit(z), gated(unit, z))


def test_controls_are_their_equations():
    z = tokens()
    add, static, sigmoid, none = (made(MixerGatedUnit, gate=gate) for gate in CONTROLS)
    torch.testing.assert_close(add(z), add.project(z) + add.mix(z))
    with torch.no_grad():
        static.table.normal_()
    torch.testing.assert_close(static(z), static.project(static.mix(z)) * static.table)
    expected = sigmoid.project(z) / (1 + (-sigmoid.mix(z)).exp())
    torch.testing.assert_close(sigmoid(z), expected)
    torch.testing.assert_close(none(z), none.mix(z))


def test_one_norm_serves_both_halves():
    block, x = made(NiNformerBlock), tokens()
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 2)
    y = x + block.unit(block.norm(x))
    torch.testing.assert_close(block(x), y + block.ffn(block.norm(y)))


def test_a_gate_of_ones_mixes_no_tokens():
    """Mix ≡ 1: each token's output depends on that token alone."""
    block, x = made(NiNformerBlock), tokens(1)

    class Ones(nn.Module):
        def forward(self, z):
            return torch.ones_like(z)

    block.unit.mix = Ones()
    jacobian = torch.autograd.functional.jacobian(block, x)[0, :, :, 0]
    for i in range(9):
        for j in range(9):
            assert bool(jacobian[i, :, j].any()) == (i == j)


def test_a_projection_of_ones_is_a_mixer_block():
    block, x = made(NiNformerBlock), tokens()
    with torch.no_grad():
        block.unit.project.weight.zero_()
        block.unit.project.bias.fill_(1.0)
    y = x + block.unit.mix(block.norm(x))
    torch.testing.assert_close(block(x), y + block.ffn(block.norm(y)))


def test_the_block_starts_near_a_square_of_its_input():
    """Without the inner MLPs and the bias of the projection, MGU(t z) = t² MGU(z)."""
    unit, z = made(MixerGatedUnit), tokens()
    with torch.no_grad():
        unit.project.bias.zero_()
        for mlp in (unit.mix.token_mlp, unit.mix.channel_mlp):
            mlp[2].weight.zero_()
            mlp[2].bias.zero_()
    torch.testing.assert_close(unit(3 * z), 9 * unit(z))


# --- what the MLP over tokens does ---------------------------------------------------------------


def permuted(model, order):
    x = tokens()
    blocks = model.blocks
    return blocks(x[:, order]), blocks(x)[:, order]


def test_without_the_token_mlp_the_order_of_tokens_does_not_matter():
    model, order = made(), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    one, two = permuted(model, order)
    assert (one - two).abs().max() > 1e-3
    for block in model.blocks:
        for part in (0, 2):
            nn.init.zeros_(block.unit.mix.token_mlp[part].weight)
            nn.init.zeros_(block.unit.mix.token_mlp[part].bias)
    torch.testing.assert_close(*permuted(model, order))


def test_a_static_gate_mixes_as_the_product_does():
    """All that the control lacks is a gate that sees the input."""
    unit = made(MixerGatedUnit, gate="static")
    jacobian = torch.autograd.functional.jacobian(unit, tokens(1))[0, :, :, 0]
    assert all(jacobian[i, :, j].any() for i in range(9) for j in range(9))
    parts = [measure.parameters(made(MixerGatedUnit, gate=gate)) for gate in ("static", "product")]
    assert parts[0] - parts[1] == 9 * 6  # the table


def test_a_local_vit_sees_the_neighbours_in_its_mlp():
    """3 x 3 tokens: the middle reads all, a corner its square of four."""
    mlp, x = LocalMLP(4, 5).double(), torch.randn(1, 9, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(mlp, x)[0, :, :, 0].abs().amax((1, 3))
    assert (jacobian[4] > 0).all()
    assert (jacobian[0] > 0).nonzero().flatten().tolist() == [0, 1, 3, 4]
    h = F.gelu(mlp.near(mlp.up(x).view(1, 3, 3, 5)).view(1, 9, 5))
    torch.testing.assert_close(mlp(x), mlp.down(h))


# --- the whole -----------------------------------------------------------------------------------


def test_model_is_its_parts():
    model, x = made(), torch.randn(2, 3, 6, 6).double()
    y = model.embed(x).flatten(1, 2)
    for block in model.blocks:
        y = block(y)
    torch.testing.assert_close(model(x), model.classifier.head(y.mean(1)))


@pytest.mark.parametrize("gate", ["product", *CONTROLS])
def test_every_parameter_gets_a_gradient(gate):
    model = made(gate=gate)
    model(torch.randn(4, 3, 6, 6).double()).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_dropout_is_in_every_mlp():
    with torch.device("meta"):
        block = models.create("ninformer").blocks[0]
    rates = [part.p for part in block.modules() if isinstance(part, nn.Dropout)]
    assert rates == [0.5] * 6


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="product"):
        config(gate="produkt")
    with pytest.raises(ValueError, match="image_size 7 is not a multiple of patch_size 2"):
        config(image_size=7)
    with pytest.raises(ValueError, match=r"expected \[B, 3, 6, 6\]"):
        made()(torch.zeros(1, 3, 8, 8).double())


def test_what_is_not_decayed():
    assert made().no_weight_decay() == set()
    assert made(gate="static").no_weight_decay() == {f"blocks.{i}.unit.table" for i in range(2)}
