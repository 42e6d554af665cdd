"""Windows, patches, norms, attention and stochastic depth."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook.layers.vision import (
    MLP,
    Classifier,
    ConvBN,
    DropPath,
    LayerNorm2d,
    LayerScale,
    PatchEmbed,
    SelfAttention,
    fold_batch_norms,
    merge_windows,
    partition_windows,
)


@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 2), (6, 9, 3), (5, 5, 5), (4, 2, 1)])
def test_partition_puts_each_token_in_its_window(height, width, side):
    x = torch.randn(2, height, width, 3)
    windows = partition_windows(x, side)
    assert windows.shape == (2, height * width // side**2, side**2, 3)
    for y in range(height):
        for column in range(width):
            window = (y // side) * (width // side) + column // side
            token = (y % side) * side + column % side
            assert torch.equal(windows[:, window, token], x[:, y, column])


@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 2), (6, 9, 3), (9, 3, 3), (5, 5, 5)])
def test_merge_inverts_partition(height, width, side):
    x = torch.randn(2, height, width, 3)
    assert torch.equal(merge_windows(partition_windows(x, side), side, height), x)


def test_partition_refuses_a_map_without_whole_windows():
    with pytest.raises(ValueError, match="6x8 tokens has no whole windows of side 4"):
        partition_windows(torch.zeros(1, 6, 8, 1), 4)


def test_patch_embedding_is_a_linear_map_of_each_patch():
    torch.manual_seed(0)
    embed = PatchEmbed(in_channels=3, d_model=8, patch_size=4)
    images = torch.randn(2, 3, 8, 12)
    tokens = embed(images)
    assert tokens.shape == (2, 2, 3, 8)
    patch = images[1, :, 4:8, 8:12].flatten()
    projected = embed.proj.weight.flatten(1) @ patch + embed.proj.bias
    torch.testing.assert_close(tokens[1, 1, 2], embed.norm(projected), atol=1e-5, rtol=1e-5)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    y = drop(torch.ones(20_000, 2, 3))
    per_sample = y.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert per_sample[:, 0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_drop_path_does_nothing_in_evaluation():
    x = torch.randn(4, 2)
    assert torch.equal(DropPath(0.9).eval()(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_refuses_an_impossible_rate(rate):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        DropPath(rate)


# --- parts of the backbones ----------------------------------------------------------------------


def test_channel_norm_is_layer_norm_at_each_position():
    torch.manual_seed(0)
    norm, x = LayerNorm2d(5), torch.randn(2, 5, 3, 4)
    with torch.no_grad():
        norm.weight.uniform_()
        norm.bias.uniform_()
    x[0, :, 0, 0] += 100  # no other position may see it
    y = norm(x)
    for place in ((0, 0), (1, 2)):
        column = x[:, :, *place]
        centred = column - column.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
        torch.testing.assert_close(y[:, :, *place], centred / scale * norm.weight + norm.bias)


def test_layer_scale_scales_channels():
    x = torch.randn(2, 3, 4, 5)
    last, first = LayerScale(5, 0.1), LayerScale(3, 0.1, dim=1)
    with torch.no_grad():
        last.gamma[2], first.gamma[1] = 7.0, 8.0
    torch.testing.assert_close(last(x)[..., 2], 7 * x[..., 2])
    torch.testing.assert_close(last(x)[..., 1], 0.1 * x[..., 1])
    torch.testing.assert_close(first(x)[:, 1], 8 * x[:, 1])
    torch.testing.assert_close(first(x)[:, 2], 0.1 * x[:, 2])


@pytest.mark.parametrize(
    ("kernel", "options", "shape"),
    [(1, {}, (2, 6, 8, 8)), (3, {"stride": 2}, (2, 6, 4, 4)), (5, {"groups": 3}, (2, 6, 8, 8))],
)
def test_folded_batch_norms_change_nothing(kernel, options, shape):
    torch.manual_seed(0)
    model = nn.Sequential(ConvBN(3, 6, kernel, **options), nn.ReLU(), nn.Sequential(ConvBN(6, 2)))
    x = torch.randn(2, 3, 8, 8)
    model(3 * x + 1)  # so that the running statistics are not 0 and 1
    with torch.no_grad():
        model[0][1].bias.uniform_()
    model.eval()
    before = model(x)
    assert model[0](x).shape == shape
    assert fold_batch_norms(model) is model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), before)


def test_conv_bn_starts_as_nothing_with_weight_0():
    assert not ConvBN(3, 4, weight=0.0)(torch.randn(2, 3, 4, 4)).any()
    assert ConvBN(3, 4)[0].bias is None


def test_mlp_is_its_equation_and_drops_twice():
    torch.manual_seed(0)
    mlp, x = MLP(3, 5), torch.randn(7, 3)
    expected = mlp[2](F.gelu(mlp[0](x)))
    torch.testing.assert_close(mlp(x), expected)
    dropped = MLP(3, 500, dropout=0.5)
    assert [type(part).__name__ for part in dropped] == [
        "Linear", "GELU", "Dropout", "Linear", "Dropout",
    ]  # fmt: skip
    share = (dropped(torch.randn(900, 3)) == 0).double().mean()
    assert 0.45 < share < 0.55


def test_attention_is_a_loop_over_heads_and_tokens():
    torch.manual_seed(0)
    layer, x = SelfAttention(6, 2).double(), torch.randn(2, 5, 6).double()
    q, k, v = layer.qkv(x).chunk(3, -1)
    expected = torch.empty_like(x)
    for b in range(2):
        for h in range(2):
            own = slice(3 * h, 3 * h + 3)
            for i in range(5):
                scores = torch.stack([q[b, i, own] @ k[b, j, own] for j in range(5)]) / 3**0.5
                expected[b, i, own] = scores.softmax(0) @ v[b, :, own]
                torch.testing.assert_close(layer.weights(x)[b, h, i], scores.softmax(0))
    torch.testing.assert_close(layer(x), layer.out(expected))
    with pytest.raises(ValueError, match="n_heads=4 must divide d_model=6"):
        SelfAttention(6, 4)


def test_heads_of_a_given_width():
    """Twice the heads, and the new ones' way out closed: plain attention."""
    torch.manual_seed(0)
    plain, wide = SelfAttention(6, 2).double(), SelfAttention(6, 4, d_head=3).double()
    with torch.no_grad():
        wide.qkv.weight.unflatten(0, (3, 12))[:, :6] = plain.qkv.weight.unflatten(0, (3, 6))
        wide.qkv.bias.unflatten(0, (3, 12))[:, :6] = plain.qkv.bias.unflatten(0, (3, 6))
        wide.out.weight[:, :6], wide.out.weight[:, 6:] = plain.out.weight, 0
        wide.out.bias.copy_(plain.out.bias)
    x = torch.randn(2, 5, 6).double()
    torch.testing.assert_close(wide(x), plain(x))


def test_classifier_takes_the_mean_over_positions():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    for place in ("before", "after", "none"):
        head = Classifier(5, 7, place)
        mean = {
            "before": lambda norm: norm(x).mean((1, 2)),
            "after": lambda norm: norm(x.mean((1, 2))),
            "none": lambda norm: x.mean((1, 2)),
        }[place](head.norm)
        torch.testing.assert_close(head(x), head.head(mean))
        torch.testing.assert_close(head(x.flatten(1, 2)), head(x))
    with pytest.raises(ValueError, match="before"):
        Classifier(5, 7, "befor")


def test_patches_without_norm_are_a_plain_convolution():
    torch.manual_seed(0)
    embed, image = PatchEmbed(3, 4, 2, norm=False), torch.randn(1, 3, 4, 6)
    patch = image[0, :, 2:4, 4:6]
    expected = (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias
    torch.testing.assert_close(embed(image)[0, 1, 2], expected)
