"""HorNet: the recursion against plain loops, its degree, its filters, sizes of every variant."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.evidence import ledger, provenance
from gatebook.layers.vision import LayerNorm2d
from gatebook.models.hornet import (
    GlobalFilter,
    HorNet,
    HorNetBlock,
    HorNetConfig,
    RecursiveGatedConv,
    step_widths,
)

ORDERS = [1, 2, 3, 4]


def randomised(module, std=0.3):
    """The module in float64, every parameter random."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double()


def layer(order, d_model=8, **changes):
    torch.manual_seed(order)
    return randomised(RecursiveGatedConv(d_model, order, 3, **changes))


def picture(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def affine(conv, x):
    """A 1x1 convolution of one position's channels, as a matrix product."""
    return conv.weight[:, :, 0, 0] @ x + conv.bias


def by_loops(module, x):
    """The layer at each position of `[C, H, W]`, neighbours outside the map being 0."""
    channels, height, width = x.shape
    n, reach = module.order, module.spatial.kernel_size[0] // 2
    widths = [channels // 2 ** (n - 1 - k) for k in range(n)]
    places = list(itertools.product(range(height), range(width)))
    split = {at: affine(module.proj_in, x[:, at[0], at[1]]) for at in places}
    out = torch.zeros_like(x)
    for y, z in places:
        q = []
        for channel in range(sum(widths)):
            total = module.spatial.bias[channel].clone()
            for dy, dz in itertools.product(range(-reach, reach + 1), repeat=2):
                if (y + dy, z + dz) in split:
                    factor = module.spatial.weight[channel, 0, dy + reach, dz + reach]
                    total = total + factor * split[y + dy, z + dz][widths[0] + channel]
            q.append(total * module.scale)
        gates = torch.stack(q).split(widths)
        p = gates[0] * split[y, z][: widths[0]]
        for k in range(1, n):
            p = gates[k] * affine(module.grow[k - 1], p)
        out[:, y, z] = affine(module.proj_out, p)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_layer_equals_loops_over_positions(order):
    module, x = layer(order, scale=0.4), picture(1, 8, 4, 5)
    torch.testing.assert_close(module(x)[0], by_loops(module, x[0]))


def test_order_one_is_a_gated_depthwise_convolution():
    module, x = layer(1), picture(2, 8, 5, 5)
    p, q = module.proj_in(x).chunk(2, 1)
    torch.testing.assert_close(module(x), module.proj_out(module.spatial(q) / 3 * p))


def test_order_zero_has_no_gate_and_is_affine():
    module, x = layer(0), picture(2, 8, 5, 5)
    torch.testing.assert_close(module(x), module.proj_out(module.spatial(module.proj_in(x)) / 3))
    zero = module(torch.zeros_like(x))
    torch.testing.assert_close(module(3 * x) - zero, 3 * (module(x) - zero))


@pytest.mark.parametrize("order", ORDERS)
def test_open_gates_leave_the_pointwise_path(order):
    """Zero kernels of bias 3 make every gate 1: a composition of 1x1 convolutions."""
    module, x = layer(order), picture(2, 8, 5, 5)
    nn.init.zeros_(module.spatial.weight)
    nn.init.constant_(module.spatial.bias, 3.0)
    p = module.proj_in(x)[:, : module.widths[0]]
    for grow in module.grow:
        p = grow(p)
    torch.testing.assert_close(module(x), module.proj_out(p))


@pytest.mark.parametrize("order", [0, *ORDERS])
def test_without_biases_the_layer_is_homogeneous_of_degree_n_plus_1(order):
    module, x = layer(order), picture(1, 8, 5, 5)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    torch.testing.assert_close(module(1.7 * x), 1.7 ** (order + 1) * module(x))


@pytest.mark.parametrize("order", [0, *ORDERS])
def test_with_biases_it_is_a_polynomial_of_degree_n_plus_1(order):
    """Differences of order n + 2 along a line vanish, those of order n + 1 do not."""
    module, x = layer(order), picture(1, 8, 5, 5)
    values = torch.stack([module(t * x) for t in range(order + 4)])
    highest = values.diff(n=order + 1, dim=0)
    assert highest.abs().max() > 1e-2 * values[1].abs().max()
    assert highest.diff(dim=0).abs().max() < 1e-10 * values.abs().max()


@pytest.mark.parametrize("order", ORDERS)
def test_the_widths_double_and_fill_the_projection(order):
    widths = step_widths(16, order)
    assert widths[-1] == 16
    assert all(b == 2 * a for a, b in itertools.pairwise(widths))
    assert sum(widths) + widths[0] == 32 == layer(order, 16).proj_in.out_channels


def test_the_first_channels_are_the_value_and_the_gates_follow():
    """Order of the split, which matters for released weights: p_0, q_0, q_1, ..."""
    module, x = layer(3), picture(1, 8, 5, 5)
    nn.init.zeros_(module.spatial.weight)
    module.spatial.weight.data[:, 0, 1, 1] = 1
    nn.init.zeros_(module.spatial.bias)
    p, gates = module.gates(x)
    projected = module.proj_in(x)
    torch.testing.assert_close(p, projected[:, :2])
    for gate, (start, stop) in zip(gates, [(2, 4), (4, 8), (8, 16)], strict=True):
        torch.testing.assert_close(3 * gate, projected[:, start:stop])


@pytest.mark.parametrize("order", [0, *ORDERS])
def test_circular_convolutions_are_equivariant_to_shifts(order):
    module, x = layer(order, padding_mode="circular"), picture(2, 8, 6, 5)
    torch.testing.assert_close(module(x.roll((2, 1), (2, 3))), module(x).roll((2, 1), (2, 3)))
    padded = layer(order)
    assert (padded(x.roll(2, 2)) - padded(x).roll(2, 2)).abs().max() > 1e-3


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_weights_of_neighbours_depend_on_the_input_only_with_gates(order):
    module = layer(order, padding_mode="circular")
    jacobians = []
    for x in picture(2, 1, 8, 5, 5):
        x.requires_grad_()
        jacobians.append(torch.autograd.grad(module(x)[0, :, 2, 2].sum(), x)[0][0])
        reached = (jacobians[-1].abs().sum(0) > 0).tolist()
        assert reached == [[1 <= i <= 3 and 1 <= j <= 3 for j in range(5)] for i in range(5)]
    assert torch.equal(jacobians[0], jacobians[1]) == (order == 0)


def global_filter(channels=6, height=4, width=5):
    torch.manual_seed(1)
    return randomised(GlobalFilter(channels, height, width))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 6), (4, 7)])
def test_a_global_filter_is_a_circular_convolution_as_large_as_the_map(height, width):
    module, x = global_filter(6, height, width), picture(1, 3, height, width)
    kernel = torch.fft.irfft2(torch.view_as_complex(module.weight), s=(height, width))
    expected = torch.zeros_like(x)
    for y, z in itertools.product(range(height), range(width)):
        expected += kernel[:, y, z, None, None] * x.roll((y, z), (2, 3))
    torch.testing.assert_close(module.filter(x), expected)


def test_the_frequency_half_is_equivariant_to_circular_shifts():
    module, x = global_filter(), picture(2, 3, 4, 5)
    torch.testing.assert_close(
        module.filter(x.roll((1, 3), (2, 3))), module.filter(x).roll((1, 3), (2, 3))
    )


def test_the_halves_are_interleaved_channel_by_channel():
    module, x = global_filter(), picture(2, 6, 4, 5)
    module.norm_out = nn.Identity()
    local, whole = module.norm_in(x).chunk(2, 1)
    mixed = module(x)
    torch.testing.assert_close(mixed[:, 0::2], module.local(local))
    torch.testing.assert_close(mixed[:, 1::2], module.filter(whole))


def test_a_global_filter_is_its_parts():
    module, x = global_filter(), picture(2, 6, 4, 5)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    normed = (x - mean) / (variance + 1e-6).sqrt()
    normed = normed * module.norm_in.weight[:, None, None] + module.norm_in.bias[:, None, None]
    local = F.conv2d(normed[:, :3], module.local.weight, padding=1, groups=3)
    weight = torch.view_as_complex(module.weight)
    whole = torch.fft.irfft2(torch.fft.rfft2(normed[:, 3:]) * weight, s=(4, 5))
    order = [0, 3, 1, 4, 2, 5]
    expected = module.norm_out(torch.cat([local, whole], 1)[:, order])
    torch.testing.assert_close(module(x), expected)


def test_a_spectrum_of_another_size_is_interpolated():
    module = global_filter(4, 3, 4)  # spectrum of 3 x 3
    ramp = torch.arange(3.0, dtype=torch.float64)
    module.weight.data = (ramp[:, None] + 10 * ramp)[None, :, :, None].repeat(2, 1, 1, 2)
    found = module.frequencies(5, 5)
    expected = (torch.arange(5) / 2)[:, None] + 10 * torch.arange(5) / 2
    torch.testing.assert_close(found.real, expected.double().expand(2, 5, 5))
    torch.testing.assert_close(found.imag, found.real)
    assert module(picture(1, 4, 5, 8)).shape == (1, 4, 5, 8)


@pytest.mark.parametrize("autocast", [True, False])
def test_frequencies_are_multiplied_in_32_bits(autocast):
    torch.manual_seed(0)
    module, x = GlobalFilter(4, 4, 4), torch.randn(1, 4, 4, 4)
    nn.init.normal_(module.weight)
    expected = module(x)
    module = module if autocast else module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert module.filter(x[:, :2].bfloat16()).dtype == torch.float32
        half = module(x.bfloat16())
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("order", [0, 1, 4])
def test_gates_are_multiplied_in_32_bits(order):
    torch.manual_seed(0)
    module, x = RecursiveGatedConv(16, order, 3, scale=1.0), torch.randn(2, 16, 6, 6)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        p, gates = module.gates(x)
        found = module(x)
    assert {t.dtype for t in (p, *gates)} == {torch.float32}
    assert found.dtype == torch.bfloat16  # of the last convolution
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


PUBLISHED = {  # parameters, multiply-adds at 224²; T and B of the released code, by the card
    "hornet_t": (22_409_512, 3_968_389_312),
    "hornet_b": (87_256_680, 15_567_143_296),
}


def on_meta(name, **changes):
    with torch.device("meta"):
        return models.create(name, **changes).eval()


def macs(model, side=224):
    return measure.flops(model, torch.empty(1, 3, side, side, device="meta")) // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_multiply_adds(name):
    model = on_meta(name)
    assert (measure.parameters(model), macs(model)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("d_model", "order", "expected"),
    [(64, 2, 19_392), (128, 3, 71_168), (256, 4, 264_832), (512, 5, 1_012_608)],
)
def test_parameters_of_the_layers_of_the_smallest_model(d_model, order, expected):
    assert measure.parameters(RecursiveGatedConv(d_model, order)) == expected


def by_formula(c):
    """Parameters and multiply-adds of a configuration, layer by layer; FFTs do not count."""
    side = c.image_size // c.patch_size
    parameters = 3 * c.patch_size**2 * c.d_model + 3 * c.d_model
    total = side**2 * 3 * c.patch_size**2 * c.d_model
    for stage, (depth, n, kind) in enumerate(zip(c.depths, c.orders, c.filters, strict=True)):
        width, pixels = c.d_model * 2**stage, (side // 2**stage) ** 2
        steps = [width // 2**k for k in range(n)][::-1]
        m = sum(steps)
        products = sum(a * b for a, b in itertools.pairwise(steps))
        spatial, mixing = 49 * m + m, 49 * m
        if kind == "global":
            rows = side // 2**stage
            spatial, mixing = 4 * m + 9 * m // 2 + m * rows * (rows // 2 + 1), 9 * m // 2
        biases = 2 * width + sum(steps[1:]) + width  # of the three kinds of 1x1 convolutions
        layer = 3 * width**2 + products + spatial + biases
        parameters += depth * (layer + 8 * width**2 + 5 * width + 6 * width)
        total += depth * pixels * (3 * width**2 + products + mixing + 8 * width**2)
        if stage < 3:
            parameters += 2 * width + 8 * width**2 + 2 * width
            total += pixels // 4 * 8 * width**2
    last = 8 * c.d_model
    return parameters + 2 * last + (last + 1) * c.n_classes, total + last * c.n_classes


@pytest.mark.parametrize("name", [f"hornet_{s}{g}" for s in "tsbl" for g in ("", "_gf")])
def test_parameters_and_multiply_adds_equal_the_formula(name):
    model = on_meta(name)
    assert (measure.parameters(model), macs(model)) == by_formula(model.config)


@pytest.mark.parametrize("d_model", [64, 128, 256, 512])
def test_cost_stays_below_the_bound_for_every_order(d_model):
    """`C (2 K^2 + 11/3 C + 2)` a position, with a product for each gate; s can be folded in."""
    for order in range(1, 1 + d_model.bit_length()):
        with torch.device("meta"):
            module, x = RecursiveGatedConv(d_model, order), torch.empty(1, d_model, 7, 7)
        c = step_widths(d_model, order)
        products = sum(a * b for a, b in itertools.pairwise(c))
        found = measure.flops(module, x) // 2
        assert found == 49 * (3 * d_model**2 + 49 * sum(c) + products)
        assert products < 2 / 3 * d_model**2
        assert found + 49 * sum(c) < 49 * d_model * (2 * 49 + 11 / 3 * d_model + 2)


def test_arms_at_medium_have_equal_multiply_adds():
    settings = ledger.load_chapter(provenance.root(), "hornet").scales["medium"].settings
    counts = {}
    for arm, changes in settings["arms"].items():
        fields = changes if arm == "windows" else settings["model"] | changes
        counts[arm] = macs(on_meta("swin_t" if arm == "windows" else "hornet_t", **fields), 32)
    for arm, count in counts.items():
        assert count == pytest.approx(counts["growing"], rel=0.002), arm


def tiny(**changes):
    sizes = {"d_model": 8, "depths": (1, 1, 2), "orders": (1, 2, 3), "filters": ("conv",) * 3}
    torch.manual_seed(0)
    return HorNet(
        HorNetConfig(**{**sizes, "image_size": 16, "patch_size": 2, "n_classes": 5, **changes})
    )


GF = {"filters": ("conv", "global", "global")}


@pytest.mark.parametrize("changes", [{}, GF, {"orders": (0, 0, 0)}])
def test_every_parameter_gets_a_gradient(changes):
    model = tiny(layer_scale=0.5, **changes)
    images = torch.randn(2, 3, 16, 16)
    maps = model.features(images)
    assert [list(m.shape) for m in maps] == [[2, 8, 8, 8], [2, 16, 4, 4], [2, 32, 2, 2]]
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("changes", [{}, GF])
def test_model_is_its_equations(changes):
    model = tiny(layer_scale=0.5, **changes).double()
    x = images = picture(2, 3, 16, 16)
    for stage, blocks in enumerate(model.stages):
        first, second = model.downsample[stage]
        x = second(first(x))
        for block in blocks:
            x = x + block.scale1.gamma[:, None, None] * block.mixer(block.norm1(x))
            w1, _, w2 = block.mlp
            hidden = F.gelu(block.norm2(x.permute(0, 2, 3, 1)) @ w1.weight.T + w1.bias)
            x = x + (block.scale2.gamma * (hidden @ w2.weight.T + w2.bias)).permute(0, 3, 1, 2)
    mean = F.layer_norm(x.mean((2, 3)), (32,), eps=1e-6)
    torch.testing.assert_close(model(images), model.classifier.head(mean))
    assert isinstance(model.downsample[0][1], LayerNorm2d)
    assert isinstance(model.downsample[1][0], LayerNorm2d)


def test_a_fresh_block_is_nearly_the_identity():
    torch.manual_seed(0)
    block = HorNetBlock(8, RecursiveGatedConv(8, 3), 32, drop_path=0.0, layer_scale=1e-6)
    x = torch.randn(1, 8, 5, 5)
    assert 0 < (block(x) - x).abs().max() < 1e-5


def test_initialisation_of_the_released_code():
    model = tiny(d_model=64, **GF)
    mixer = model.stages[2][0].mixer
    for weight in (mixer.proj_in.weight, mixer.spatial.weight, model.downsample[1][1].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not mixer.proj_in.bias.any()
    assert model.stages[0][0].mixer.spatial.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.config.scale == mixer.scale == 1 / 3


def test_published_settings():
    rates = {"hornet_t": 0.2, "hornet_s": 0.4, "hornet_b": 0.5}
    for name, rate in rates.items():
        model = on_meta(name)
        assert [len(stage) for stage in model.stages] == [2, 3, 18, 2]
        assert [stage[0].mixer.order for stage in model.stages] == [2, 3, 4, 5]
        assert model.stages[-1][-1].drop_path.rate == pytest.approx(rate)
        assert model.stages[0][0].drop_path.rate == 0
    stages = on_meta("hornet_t_gf").stages
    spectra = [getattr(stage[0].mixer.spatial, "weight", None).shape[1:3] for stage in stages[2:]]
    assert spectra == [(14, 8), (7, 4)]
    assert isinstance(stages[1][0].mixer.spatial, nn.Conv2d)


def test_larger_images_pass_both_variants():
    for changes in ({}, GF):
        assert tiny(**changes)(torch.randn(1, 3, 24, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": (1, 2)}, "3 depths, 2 orders and 3 filters"),
        ({"image_size": 20}, "image_size 20 is not a multiple of 8"),
        ({"orders": (1, 2, 7)}, "order 7 needs a multiple of 64 channels, got 32"),
        ({"orders": (1, 2, -1)}, "order -1 is negative"),
        ({"kernel_size": 4}, "kernel_size 4: it must be odd"),
        ({"kernel_size": -1}, "kernel_size -1: it must be odd and at least 1"),
        ({"filters": ("conv", "conv", "fft")}, "filter.*fft.*conv, global"),
        ({"d_model": 1, "orders": (1, 1, 1), "filters": ("global", "conv", "conv")}, "1 is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    sizes = {"d_model": 8, "depths": (1, 1, 2), "orders": (1, 2, 3), "filters": ("conv",) * 3}
    with pytest.raises(ValueError, match=message):  # by the configuration, before a layer is built
        HorNetConfig(**{**sizes, "image_size": 16, "patch_size": 2, **changes})


@pytest.mark.parametrize("shape", [(1, 3, 20, 16), (1, 1, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\].*multiples of 8"):
        tiny()(torch.zeros(shape))


def test_the_control_has_no_value_path():
    config = dataclasses.replace(tiny().config, orders=(0, 0, 0))
    mixer = HorNet(config).stages[0][0].mixer
    assert mixer.proj_in.out_channels == mixer.spatial.out_channels == 8
    assert mixer.gates(torch.zeros(1, 8, 4, 4))[0].shape == (1, 0, 4, 4)
