"""SHViT: every part against an oracle, and the published sizes by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.evidence import ledger, provenance
from gatebook.models.shvit import (
    MODELS,
    SHSA,
    Depthwise,
    Downsampling,
    SHViT,
    SHViTConfig,
    SqueezeExcite,
    Stem,
)

TINY = {
    "widths": (8, 16, 24),
    "depths": (1, 2, 1),
    "partial": (2, 4, 6),
    "qk_width": 3,
    "image_size": 64,
    "n_classes": 5,
}


def randomise(module):
    """Random asymmetric parameters and statistics, in float64."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module.double().eval()


def tiny(**changes):
    torch.manual_seed(0)
    return SHViT(SHViTConfig(**(TINY | changes)))


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conv_bn_by_hand(layer, x):
    """A 1x1 ConvBN of `[channels, N]` in evaluation mode, with numpy."""
    conv, norm = layer
    y = conv.weight.detach().numpy()[:, :, 0, 0] @ x
    mean, var = norm.running_mean.numpy()[:, None], norm.running_var.numpy()[:, None]
    weight, bias = norm.weight.detach().numpy()[:, None], norm.bias.detach().numpy()[:, None]
    return (y - mean) / np.sqrt(var + norm.eps) * weight + bias


def shsa_by_loops(layer, x):
    """The layer on `[C, N]`, one head, query and key at a time."""
    c_p, d, n = layer.partial, layer.qk_width, layer.n_heads
    x_a, x_r = x[:c_p], x[c_p:]
    norm = layer.norm
    normed = (x_a - x_a.mean()) / np.sqrt(x_a.var() + 1e-5)
    normed = normed * norm.weight.detach().numpy()[:, None] + norm.bias.detach().numpy()[:, None]
    qkv = conv_bn_by_hand(layer.qkv, normed)
    positions, width = x.shape[1], c_p // n
    y_a = np.zeros_like(x_a)
    for head in range(n):
        q = qkv[head * d : (head + 1) * d]
        k = qkv[n * d + head * d : n * d + (head + 1) * d]
        v = qkv[2 * n * d + head * width : 2 * n * d + (head + 1) * width]
        for i in range(positions):
            logits = [q[:, i] @ k[:, j] / math.sqrt(d) for j in range(positions)]
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            for j in range(positions):
                y_a[head * width : (head + 1) * width, i] += weights[j] * v[:, j]
    return conv_bn_by_hand(layer.proj[1], np.maximum(np.concatenate([y_a, x_r]), 0))


@pytest.mark.parametrize(("partial", "n_heads"), [(3, 1), (7, 1), (12, 1), (12, 4), (6, 2)])
def test_attention_equals_loops(partial, n_heads):
    torch.manual_seed(0)
    layer, x = randomise(SHSA(12, partial, 5, n_heads)), draw(2, 12, 3, 4)
    for sample, y in zip(x, layer(x), strict=True):
        expected = shsa_by_loops(layer, sample.flatten(1).numpy())
        np.testing.assert_allclose(y.flatten(1).detach().numpy(), expected, atol=1e-12)


def test_all_channels_are_torchs_single_head_attention():
    torch.manual_seed(0)
    layer, x = randomise(SHSA(12, 12, 5)), draw(2, 12, 3, 4)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).mT.split([5, 5, 12], -1)
    y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), layer.proj(y), atol=1e-12, rtol=0)


def test_no_attending_channels_leave_relu_and_projection():
    torch.manual_seed(0)
    layer, x = randomise(SHSA(6, 0)), draw(2, 6, 3, 3)
    assert set(dict(layer.named_children())) == {"proj"}
    torch.testing.assert_close(layer(x), layer.proj[1](x.relu()))


def test_attention_commutes_with_permutations_of_positions():
    torch.manual_seed(0)
    layer, x = randomise(SHSA(12, 5, 4)), draw(2, 12, 3, 4)
    order = torch.randperm(12)

    def moved(z):
        return z.flatten(2)[..., order].reshape(z.shape)

    torch.testing.assert_close(layer(moved(x)), moved(layer(x)), atol=1e-12, rtol=0)


def test_weights_are_over_keys_and_average_the_values():
    torch.manual_seed(0)
    layer, x = randomise(SHSA(12, 12, 4, n_heads=3)), draw(2, 12, 3, 4)
    weights = layer.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 12).double())
    assert (weights.sum(-2) - 1).abs().max() > 0.1
    v = layer.qkv(layer.norm(x)).flatten(2)[:, 24:].unflatten(1, (3, 4))  # [B, n, 4, N]
    y = torch.einsum("bnij,bncj->bnci", weights, v).reshape(x.shape)
    torch.testing.assert_close(layer(x), layer.proj(y), atol=1e-12, rtol=0)


def test_the_rest_is_not_normed_and_reaches_its_own_position_alone():
    torch.manual_seed(0)
    layer = randomise(SHSA(8, 3, 4))
    layer.proj[0] = nn.Identity()  # without ReLU the rest passes linearly
    x, change = draw(1, 8, 3, 3), torch.zeros(1, 8, 3, 3).double()
    change[0, 3:, 1, 2] = 1.0
    once, twice = layer(x + change) - layer(x), layer(x + 2 * change) - layer(x)
    torch.testing.assert_close(2 * once, twice, atol=1e-12, rtol=0)
    assert (once.abs().sum((0, 1)) > 1e-9).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_starts_as_the_identity(name):
    torch.manual_seed(0)
    config = dataclasses.replace(MODELS[name][1], depths=(1, 1, 1))
    model = SHViT(config).train()
    for stage, width in zip(model.stages, config.widths, strict=True):
        x = torch.randn(2, width, 4, 4)
        assert torch.equal(stage(x), x)


def test_downsampling_starts_with_live_depthwise_convolutions_and_silent_ffns():
    torch.manual_seed(0)
    part, x = Downsampling(8, 12), torch.randn(2, 8, 6, 6)
    for block, z in ((part[0], x), (part[-1], torch.randn(2, 12, 3, 3))):
        assert torch.equal(block(z), block.depthwise(z))
        assert not torch.allclose(block(z), z)
    assert part(x).shape == (2, 12, 3, 3)


@pytest.mark.parametrize(
    ("width", "hidden"), [(128, 128), (308, 312), (352, 352), (336, 336), (12, 16), (4, 8)]
)
def test_hidden_width_of_the_gate(width, hidden):
    with torch.device("meta"):
        gate = Downsampling(width, 8)[5].gate
    assert gate[0].weight.shape == (hidden, 4 * width, 1, 1)


def test_squeeze_excite_scales_channels_by_their_means():
    torch.manual_seed(0)
    layer, x = randomise(SqueezeExcite(6, 4)), draw(2, 6, 3, 5)
    first, second = layer.gate[0], layer.gate[2]
    means = x.sum((2, 3)) / 15
    hidden = (means @ first.weight[:, :, 0, 0].T + first.bias).clamp(min=0)
    scale = 1 / (1 + torch.exp(-(hidden @ second.weight[:, :, 0, 0].T + second.bias)))
    torch.testing.assert_close(layer(x), x * scale[:, :, None, None])


def test_stem_has_four_strided_convolutions_and_no_relu_at_its_end():
    stem = Stem(3, 64, (2, 2, 2, 2))
    kinds = [type(part).__name__ for part in stem]
    assert kinds == ["ConvBN", "ReLU"] * 3 + ["ConvBN"]
    convolutions = list(stem)[::2]
    assert [part[0].out_channels for part in convolutions] == [8, 16, 32, 64]
    assert all(part[0].stride == (2, 2) and part[0].kernel_size == (3, 3) for part in convolutions)
    y = stem(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 64, 4, 4)
    assert (y < 0).any()


def test_model_is_its_parts():
    model, x = randomise(tiny()), draw(2, 3, 64, 64)
    z = model.stem(x)
    for i, stage in enumerate(model.stages):
        z = model.downsampling[i - 1](z) if i else z
        for block in stage:
            z = z + block.depthwise.conv(z)
            if i:  # the first stage has no attention
                z = z + block.attention(z)
            assert (block.attention is None) == (i == 0)
            hidden = block.ffn[0](z).clamp(min=0)
            z = z + block.ffn[2](hidden)
    expected = model.head(model.norm(z.flatten(2).mean(-1)))
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("side", [64, 128])
def test_one_image_is_refused_in_training_alone(side):
    model, x = tiny().train(), torch.randn(2, 3, side, side)
    with pytest.raises(ValueError, match="one image has no batch statistics"):
        model(x[:1])
    assert model(x).shape == (2, 5)
    assert model.eval()(x[:1]).shape == (1, 5)


@pytest.mark.parametrize("mixing", ["uniform", "own"])
def test_controls_average_all_positions_or_their_own(mixing):
    torch.manual_seed(0)
    layer, x = randomise(SHSA(12, 8, 4, n_heads=2, mixing=mixing)), draw(2, 12, 3, 4)
    v = layer.qkv(layer.norm(x[:, :8]))[:, 16:]
    if mixing == "uniform":
        v = v.mean((2, 3), keepdim=True).expand_as(v)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat([v, x[:, 8:]], 1)))
    assert measure.parameters(layer) == measure.parameters(SHSA(12, 8, 4, n_heads=2))


@pytest.mark.parametrize("scale", ["small", "medium", "full"])
def test_no_two_arms_of_the_chapter_are_the_same_function(scale):
    settings = ledger.load_chapter(provenance.root(), "shvit").scales[scale].settings
    outputs = []
    for changes in settings["arms"].values():
        torch.manual_seed(0)
        base = settings["model"] | changes
        model = models.create(settings.get("name", "shvit_s1"), **base)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # open the branches
            if isinstance(module, SHSA):
                nn.init.constant_(module.qkv[1].weight, 5.0)  # weights that are not uniform
        images = torch.randn(4, model.config.in_channels, 64, 64)
        with torch.no_grad():
            outputs.append(model(images))
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).norm() / one.norm() > 1e-3


def test_folding_changes_no_output_and_leaves_one_batch_norm():
    torch.manual_seed(0)
    model = models.create("shvit_s1", depths=(1, 1, 1), n_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    expected = model.eval()(x)
    assert model.fold() is model
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms == [model.norm]
    assert all(m.merged for m in model.modules() if isinstance(m, Depthwise))
    torch.testing.assert_close(model.fold()(x), expected, atol=1e-4, rtol=1e-4)  # once is enough


def on_meta(name, **changes):
    with torch.device("meta"):
        return models.create(name, **changes).eval()


def macs(model, side=None):
    side = side or model.config.image_size
    return measure.flops(model, torch.empty(1, 3, side, side, device="meta")) // 2


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [("shvit_s1", 6_330_808, 0.2413), ("shvit_s4", 16_588_484, 0.9862)],
)
def test_published_sizes(name, parameters, multiply_adds):
    model = on_meta(name)
    assert measure.parameters(model) == parameters
    assert macs(model) / 1e9 == pytest.approx(multiply_adds, abs=5e-5)


def conv_bn(c_in, c_out, kernel=1, groups=1):
    return c_out * (c_in // groups * kernel**2 + 2)


def parameters_by_hand(c):
    """Parameters of a configuration, added up layer by layer."""
    first = c.widths[0]
    stem = [c.in_channels, first // 8, first // 4, first // 2, first]
    total = sum(conv_bn(a, b, 3) for a, b in itertools.pairwise(stem))
    for i, (width, depth, c_p) in enumerate(zip(c.widths, c.depths, c.partial, strict=True)):
        plain = conv_bn(width, width, 3, width) + conv_bn(width, 2 * width)
        plain += conv_bn(2 * width, width)
        attention = conv_bn(c_p, 32 + c_p) + 2 * c_p + conv_bn(width, width) if i else 0
        total += depth * (plain + attention)
        if i < 2:
            wide, out = 4 * width, c.widths[i + 1]
            hidden = round(width / 8 + 1e-9) * 8
            total += plain + conv_bn(width, wide) + conv_bn(wide, wide, 3, wide)
            total += 2 * hidden * wide + hidden + wide + conv_bn(wide, out)
            total += 9 * out + 2 * out + conv_bn(out, 2 * out) + conv_bn(2 * out, out)
    return total + 2 * width + (width + 1) * c.n_classes


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_sum_of_the_layers(name):
    model = on_meta(name)
    assert measure.parameters(model) == parameters_by_hand(model.config)


def test_attention_layer_of_the_largest_width():
    layer = on_meta("shvit_s4").stages[2][0].attention
    assert measure.parameters(layer) == 214_336


@pytest.mark.parametrize(("width", "partial", "side"), [(224, 48, 7), (448, 96, 4)])
def test_multiply_adds_of_attention_equal_the_formula(width, partial, side):
    n = side**2
    with torch.device("meta"):
        layer, x = SHSA(width, partial).eval(), torch.empty(1, width, side, side)
    each = partial * (32 + partial) + n * (16 + partial) + width**2
    assert measure.flops(layer, x) // 2 == n * each
    assert width**2 > each / 2


def test_positions_of_each_stage():
    x = torch.empty(1, 3, 224, 224, device="meta")
    assert [m.shape[-1] for m in on_meta("shvit_s1").features(x)] == [14, 7, 4]


@pytest.mark.parametrize("kinds", ["iss", "iii"])
def test_every_parameter_has_a_gradient_once_the_branches_are_open(kinds):
    model = randomise(tiny(kinds=kinds)).train()
    model(draw(4, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, "3 widths but 2 depths"),
        ({"kinds": "is"}, "3 widths but 2 kinds"),
        ({"kinds": "ist"}, "unknown kind of block 't'"),
        ({"partial": (2, 4, 30)}, "stage 3: 30 of 24 channels attend in 1 heads"),
        ({"n_heads": (1, 3, 1)}, "stage 2: 4 of 16 channels attend in 3 heads"),
        ({"widths": (12, 16, 24)}, "4 convolutions of the stem do not double up to 12"),
        ({"stem": ()}, "0 convolutions of the stem"),
        ({"n_heads": (0, 1, 1)}, r"at least 1, got 3 and \(0, 1, 1\)"),
        ({"qk_width": 0}, "at least 1, got 0 and"),
        ({"mixing": "mean"}, "unknown mixing 'mean'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (3, 64, 64)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        tiny()(torch.zeros(shape))
