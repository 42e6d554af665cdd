"""Activator: against loops over patches that know no tensor of tokens, and exact counts."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gatebook import measure
from gatebook.models import create
from gatebook.models.activator import GATES, Activator, ActivatorBlock, ActivatorConfig, GatedUnit

TINY = {"d_model": 6, "hidden": 8, "depth": 2, "image_size": 6, "patch_size": 2, "n_classes": 5}


def activator(**changes):
    """A small model in float64, in evaluation mode, whose every parameter is random."""
    torch.manual_seed(0)
    model = Activator(ActivatorConfig(**(TINY | changes)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def pictures(n=2):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


# ------------------------------------------------------------------ equations, patch by patch

ACTIVATIONS = {
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
}


def affine(weights, name, v):
    return weights[f"{name}.weight"] @ v + weights[f"{name}.bias"]


def normed(weights, name, v):
    v = (v - v.mean()) / np.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)
    return v * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def by_patches(model, picture):
    """Logits of one picture `[c, H, W]`, from the equations of the card."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    c, logits = model.config, []
    act = np.vectorize(ACTIVATIONS[c.gate])
    for top in range(0, c.image_size, c.patch_size):
        for left in range(0, c.image_size, c.patch_size):
            patch = picture[:, top : top + c.patch_size, left : left + c.patch_size]
            x = (w["embed.proj.weight"] * patch).sum((1, 2, 3)) + w["embed.proj.bias"]
            for i in range(c.depth):
                at = f"blocks.{i}"
                y = normed(w, f"{at}.norm", x)
                gate = normed(w, f"{at}.unit.norm", act(affine(w, f"{at}.unit.w1", y)))
                value = normed(w, f"{at}.unit.norm", affine(w, f"{at}.unit.w2", y))
                x = x + affine(w, f"{at}.unit.w3", gate * value)
                if c.ffn:
                    y = affine(w, f"{at}.ffn.0", normed(w, f"{at}.norm", x))
                    y = np.vectorize(ACTIVATIONS["gelu"])(y)
                    x = x + affine(w, f"{at}.ffn.{3 if c.dropout else 2}", y)
            logits.append(affine(w, "classifier.head", x))
    return np.mean(logits, axis=0)


@pytest.mark.parametrize("changes", [{}, {"ffn": False}, {"gate": "silu"}, {"gate": "relu"}])
def test_model_equals_the_equations_patch_by_patch(changes):
    model, x = activator(**changes), pictures()
    expected = [by_patches(model, picture) for picture in x.numpy()]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-12)


class GeluTwice(GatedUnit):
    def forward(self, x):
        return self.w3(self.gate(x) * self.norm(self.activation(self.w2(x))))


class NormFirst(GatedUnit):
    def gate(self, x):
        return self.activation(self.norm(self.w1(x)))


class TwoNorms(GatedUnit):
    def forward(self, x):
        other = nn.functional.layer_norm(self.w2(x), self.norm.normalized_shape)
        return self.w3(self.gate(x) * other)


class NoNorms(GatedUnit):
    def forward(self, x):
        return self.w3(self.activation(self.w1(x)) * self.w2(x))


class Tanh(GatedUnit):
    def gate(self, x):
        return self.norm(nn.functional.gelu(self.w1(x), approximate="tanh"))


@pytest.mark.parametrize("fault", [GeluTwice, NormFirst, TwoNorms, NoNorms, Tanh])
def test_the_oracle_sees_a_fault_in_the_unit(fault):
    model, x = activator(), pictures(1)
    for block in model.blocks:
        block.unit.__class__ = fault
    assert np.abs(model(x)[0].detach().numpy() - by_patches(model, x[0].numpy())).max() > 1e-6


class OwnNorm(ActivatorBlock):
    def forward(self, x):
        x = x + self.unit(self.norm(x))
        return x + self.ffn(nn.functional.layer_norm(x, self.norm.normalized_shape))


class Parallel(ActivatorBlock):
    def forward(self, x):
        return x + self.unit(self.norm(x)) + self.ffn(self.norm(x))


@pytest.mark.parametrize("fault", [OwnNorm, Parallel])
def test_the_oracle_sees_a_fault_in_the_block(fault):
    model, x = activator(), pictures(1)
    for block in model.blocks:
        block.__class__ = fault
    assert np.abs(model(x)[0].detach().numpy() - by_patches(model, x[0].numpy())).max() > 1e-6


def test_a_gate_of_ones_leaves_linear_norm_linear():
    unit = GatedUnit(6, 8).double()
    unit.gate = torch.ones_like
    x = torch.randn(3, 8, dtype=torch.float64)
    unit.w2 = nn.Identity()
    torch.testing.assert_close(unit(x), unit.w3(unit.norm(x)))


# ------------------------------------------------------------------ nothing mixes the tokens


@pytest.mark.parametrize("ffn", [True, False])
def test_permuting_tokens_permutes_outputs_and_leaves_logits(ffn):
    model, x = activator(ffn=ffn), torch.randn(2, 9, 6, dtype=torch.float64)
    order = torch.randperm(9)
    y = model.blocks(x)
    torch.testing.assert_close(model.blocks(x[:, order]), y[:, order], atol=1e-12, rtol=0)
    torch.testing.assert_close(
        model.classifier(y[:, order]), model.classifier(y), atol=1e-12, rtol=0
    )


def mixing(model):
    """Largest derivative of an output token by another token, and the least by itself."""
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(model.blocks, x)[0, :, :, 0]  # [N, D, N, D]
    size = jacobian.abs().amax((1, 3))
    itself = torch.eye(9, dtype=torch.bool)
    return size[~itself].max().item(), size[itself].min().item()


@pytest.mark.parametrize("changes", [{}, {"ffn": False}, {"positions": True}])
def test_no_token_depends_on_another(changes):
    across, own = mixing(activator(**changes))
    assert across == 0
    assert own > 1e-3


def test_a_gated_unit_over_the_tokens_mixes_them():
    assert mixing(activator(token_hidden=4))[0] > 1e-3


@pytest.mark.parametrize("changes", [{"positions": True}, {"token_hidden": 4}])
def test_the_extensions_see_where_a_patch_is(changes):
    x = pictures()
    moved = x.roll(2, dims=-1)  # by one patch
    torch.testing.assert_close(activator()(moved), activator()(x), atol=1e-12, rtol=0)
    model = activator(**changes)
    assert (model(moved) - model(x)).abs().max() > 1e-3


def test_token_unit_is_the_gated_unit_on_the_other_axis():
    model = activator(token_hidden=4, ffn=False)
    block, x = model.blocks[0], torch.randn(1, 9, 6, dtype=torch.float64)
    y = x.clone()
    for channel in range(6):
        y[0, :, channel] += block.token_unit(block.norm(x)[0, :, channel])
    torch.testing.assert_close(block(x), y + block.unit(block.norm(y)))


def test_the_mean_vote_is_the_logits():
    model, x = activator(positions=True), pictures()
    assert model.votes(x).shape == (2, 9, 5)
    torch.testing.assert_close(model.votes(x).mean(1), model(x))


# ------------------------------------------------------------------ the published sizes

BLOCKS = {  # parameters and multiply-adds of one block on 64 tokens: the card's table
    "activator": (658_944, 41_943_040),
    "activator_glu": (396_032, 25_165_824),
    "activator_vit": (527_104, 35_651_584),
    "activator_mixer": (330_048, 33_554_432),
}
MODELS = {  # the last two by hand: patches 12,544, head 2,570, positions 16,384, blocks
    "activator": 2_650_890,
    "activator_glu": 1_599_242,
    "activator_vit": 12_544 + 2_570 + 16_384 + 4 * 527_104,
    "activator_mixer": 12_544 + 2_570 + 4 * 330_048,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_published_parameters_and_macs(name):
    with torch.device("meta"):
        model = create(name).eval()
        macs = measure.flops(model.blocks[0], torch.empty(1, 64, 256)) // 2
    assert measure.parameters(model) == MODELS[name]
    assert (measure.parameters(model.blocks[0]), macs) == BLOCKS[name]


def test_norms_of_their_own_would_add_1024_and_512():
    with torch.device("meta"):
        block = create("activator").blocks[0]
    norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm)]
    assert sorted(measure.parameters(norm) for norm in norms) == [512, 1024]


@pytest.mark.parametrize(("tokens", "cheaper"), [(64, False), (256, None), (1024, True)])
def test_the_unit_is_cheaper_than_attention_from_n_greater_d(tokens, cheaper):
    """6 D² against 4 D² + 2 N D multiply-adds a token."""
    with torch.device("meta"):
        x = torch.empty(1, tokens, 256)
        unit = measure.flops(create("activator").blocks[0].unit, x) // 2 // tokens
        attention = measure.flops(create("activator_vit").blocks[0].attention, x) // 2 // tokens
    assert (unit, attention) == (6 * 256**2, 4 * 256**2 + 2 * tokens * 256)
    assert (unit == attention) if cheaper is None else ((unit < attention) == cheaper)


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("changes", [{}, {"ffn": False}, {"positions": True, "token_hidden": 4}])
def test_every_parameter_gets_a_gradient(changes):
    model = activator(**changes)
    model(pictures()).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_dropout_is_in_the_plain_mlp_only():
    x = pictures()
    for ffn, same in ((True, False), (False, True)):
        model = activator(ffn=ffn).train()
        assert torch.equal(model(x), model(x)) == same
    rates = [m.p for m in activator().modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.5] * 4


@pytest.mark.parametrize("name", BLOCKS)
def test_initialisation_is_torchs_own(name):
    torch.manual_seed(0)
    model = create(name, depth=1)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= fan_in**-0.5
            assert module.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert module.eps == 1e-5


def test_positions_start_at_zero_and_do_not_decay():
    model = Activator(ActivatorConfig(**TINY, positions=True))
    assert not model.positions.any()
    assert model.no_weight_decay() == {"positions"}
    assert activator().no_weight_decay() == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "glu"}, "unknown gate 'glu'.*Allowed: gelu, relu, silu"),
        ({"image_size": 7}, "image_size 7 is not a multiple of patch_size 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ActivatorConfig(**(TINY | changes))


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (1, 3, 8, 8), (1, 1, 6, 6), (3, 6, 6)])
@pytest.mark.parametrize("changes", [{}, {"positions": True}, {"token_hidden": 4}])
def test_images_of_another_shape_are_refused(changes, shape):
    model = activator(**changes)
    for read in (model, model.votes, model.tokens):
        with pytest.raises(ValueError, match=r"expected \[B, 3, 6, 6\]"):
            read(torch.zeros(shape, dtype=torch.float64))


def test_a_block_of_each_gate_differs():
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    outputs = []
    for gate in GATES:
        torch.manual_seed(0)
        block = ActivatorBlock(ActivatorConfig(**TINY, gate=gate)).double().eval()
        outputs.append(block(x))
    for i in range(3):
        assert (outputs[i] - outputs[i - 1]).abs().max() > 1e-3
