"""Vision Transformer and MLP-Mixer, the controls of the vision chapters."""

import pytest
import torch
from torch import nn

from gatebook import measure, models
from gatebook.models.vit import MixerBlock, ViT, ViTBlock, ViTConfig

TINY = {"d_model": 8, "depth": 2, "n_heads": 2, "image_size": 8, "patch_size": 2, "n_classes": 5}


def vit(**changes):
    torch.manual_seed(0)
    return ViT(ViTConfig(**(TINY | changes))).double()


def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("deit_ti", 5_717_416), ("deit_s", 22_050_664), ("deit_b", 86_567_656)],
)
def test_parameters_are_deits(name, parameters):
    with torch.device("meta"):
        assert measure.parameters(models.create(name)) == parameters


def test_parameters_of_the_mixer():
    """Card of NiNformer: four blocks of width 256, 64 tokens, 512 hidden channels both ways."""
    sizes = {"d_model": 256, "depth": 4, "hidden": 512, "token_hidden": 512, "n_classes": 10}
    plain = {"class_token": False, "positions": False, "final_norm": False}
    with torch.device("meta"):
        model = ViT(ViTConfig(**sizes, **plain, mixer="mlp", image_size=32, patch_size=4))
    assert measure.parameters(model) == 1_335_306
    assert measure.parameters(model.blocks[0]) == 330_048


def test_model_is_its_parts():
    model, x = vit(), images()
    tokens = model.embed(x).flatten(1, 2)
    tokens = torch.cat([model.class_token.expand(2, 1, 8), tokens], 1) + model.positions
    for block in model.blocks:
        tokens = tokens + block.attention(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    expected = model.classifier.head(model.classifier.norm(tokens[:, 0]))
    torch.testing.assert_close(model(x), expected)


def test_mixer_block_is_its_equation():
    torch.manual_seed(0)
    block, x = MixerBlock(4, 6, 5, 7).double(), torch.randn(2, 6, 4).double()
    y = x.clone()
    normed = block.token_norm(x)
    for c in range(4):
        y[:, :, c] += block.token_mlp(normed[:, :, c])
    torch.testing.assert_close(block(x), y + block.channel_mlp(block.channel_norm(y)))


def test_without_positions_attention_does_not_see_where_patches_are():
    """Moving the patches changes nothing without positions, and something with them or a Mixer."""
    x = images()
    moved = x.roll(4, dims=-1)
    plain = {"class_token": False, "positions": False}
    torch.testing.assert_close(vit(**plain)(moved), vit(**plain)(x))
    for changes in ({}, {**plain, "mixer": "mlp"}):
        assert (vit(**changes)(moved) - vit(**changes)(x)).abs().max() > 1e-6


def test_every_parameter_gets_a_gradient():
    for changes in ({}, {"mixer": "mlp", "class_token": False}):
        model = vit(**changes)
        model(images()).square().sum().backward()
        assert all(parameter.grad.any() for parameter in model.parameters())


def test_initial_weights():
    model = ViT(ViTConfig(d_model=192, depth=1, n_heads=3, image_size=32))
    assert 0.019 < model.blocks[0].mlp[0].weight.std() < 0.021
    assert 0.018 < model.positions.std() < 0.022
    assert not model.blocks[0].mlp[0].bias.any()
    plain = ViT(ViTConfig(d_model=192, depth=1, n_heads=3, image_size=32, init_std=0))
    assert plain.blocks[0].mlp[0].weight.abs().max() <= 192**-0.5
    assert plain.blocks[0].mlp[0].weight.std() > 0.04


def test_paths_are_dropped_more_the_deeper():
    rates = [block.drop_path.rate for block in vit(depth=3, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_what_is_not_decayed():
    assert vit().no_weight_decay() == {"class_token", "positions"}
    assert vit(class_token=False, positions=False).no_weight_decay() == set()


def test_an_image_without_whole_patches_raises():
    with pytest.raises(ValueError, match="image_size 9 is not a multiple of patch_size 2"):
        vit(image_size=9)


def test_another_attention_can_take_its_place():
    block = ViTBlock(4, nn.Identity(), 8)
    x = torch.randn(2, 3, 4)
    y = x + block.norm1(x)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))
