"""ViG: the layer against plain loops, its symmetries, the published counts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure
from gatebook.models import create
from gatebook.models.vig import MODELS, BiGLA, ViG, ViGBlock, ViGConfig, ViGTagger, _initialise

SIZES = {  # parameters of the released code; multiply-adds of linear maps and convolutions, 10^9
    "vig_t": (5_834_536, 1.110),
    "vig_s": (22_615_144, 4.366),
    "vig_b": (None, 17.32),
}
RECURRENCE = {"vig_t": 0.06, "vig_s": 0.12, "vig_b": 0.23}  # 10^9


def config(**changes):
    return ViGConfig(**{"d_model": 24, "n_heads": 2, "depth": 2, "n_classes": 5, **changes})


def random_layer(std=0.5, **changes):
    """A layer in float64 whose every parameter is random; no norm's weight is one."""
    torch.manual_seed(0)
    layer = BiGLA(config(**changes))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer.double()


def random_map(height=3, width=5, d_model=24, batch=2):
    gen = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, d_model, generator=gen, dtype=torch.float64)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def rms(x, weight):
    return x / np.sqrt((x**2).mean() + 1e-6) * weight


def layer_by_loops(layer, x):
    """The layer on a map `[h, w, D]`, one token, head and channel at a time, in NumPy."""
    weights = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    c, (height, width, d) = layer.config, x.shape
    d_key, d_value, n = d // (2 * c.n_heads), d // c.n_heads, height * width
    u = np.zeros((height, width, d))
    for row, column, a, b in np.ndindex(height, width, 3, 3):
        y, z = row + a - 1, column + b - 1
        if 0 <= y < height and 0 <= z < width:
            u[row, column] += weights["conv.weight"][:, 0, a, b] * x[y, z]
    u = (u * sigmoid(u) if c.conv_silu else u).reshape(n, d)
    q, k, v = np.split(u @ weights["qkv.weight"].T, [d // 2, d], axis=1)
    z = u @ weights["gate.0.weight"].T @ weights["gate.1.weight"].T + weights["gate.1.bias"]
    there, back = np.split(sigmoid(z) ** (1 / 16), 2, axis=1)
    g = sigmoid(u @ weights["mix.weight"].T + weights["mix.bias"])
    mixed = np.zeros((n, d))
    for head in range(c.n_heads):
        keys = slice(head * d_key, (head + 1) * d_key)
        values = slice(head * d_value, (head + 1) * d_value)
        o = np.zeros((n, d_value))
        for order, alpha in ((range(n), there), (reversed(range(n)), back)):
            state = np.zeros((d_key, d_value))
            for t in order:
                state = alpha[t, keys, None] * state + np.outer(k[t, keys], v[t, values])
                o[t] += q[t, keys] @ state / math.sqrt(d_key) / 2
        for t in range(n):
            share, local = g[t, values], rms(u[t, values], weights["norm_local.weight"])
            whole = rms(o[t], weights["norm_global.weight"])
            mixed[t, values] = share * whole + (1 - share) * local
    y = mixed * sigmoid(mixed) if c.out_silu else mixed
    return (y @ weights["out.weight"].T).reshape(height, width, d)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 4), (1, 7)])
def test_the_layer_equals_loops_over_tokens(height, width, silu):
    layer = random_layer(conv_silu=silu, out_silu=silu)
    x = random_map(height, width)
    expected = np.stack([layer_by_loops(layer, one) for one in x.numpy()])
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


def swap_directions(layer):
    """The layer with its forward and its backward gate exchanged."""
    last = layer.gate[1]
    for parameter in (last.weight, last.bias):
        parameter.data = parameter.data.roll(len(parameter) // 2, 0)


def test_a_shared_gate_makes_blocks_symmetric_under_reversal():
    torch.manual_seed(0)
    c = config(gates="shared", local="none")
    blocks = nn.Sequential(ViGBlock(c), ViGBlock(c)).double()
    x = random_map(1, 17)
    torch.testing.assert_close(blocks(x.flip(2)), blocks(x).flip(2), atol=1e-12, rtol=0)


def test_direction_wise_gates_break_the_symmetry_unless_they_are_swapped():
    layer = random_layer(local="none")
    x = random_map(1, 17)
    before = layer(x).flip(2)
    assert (layer(x.flip(2)) - before).abs().max() > 1e-3
    swap_directions(layer)
    torch.testing.assert_close(layer(x.flip(2)), before, atol=1e-12, rtol=0)


def test_a_map_turned_by_half_a_turn_is_reversal_for_a_turned_kernel():
    layer = random_layer(gates="shared")
    x = random_map()
    before = layer(x).flip(1, 2)
    layer.conv.weight.data = layer.conv.weight.data.flip(2, 3)
    torch.testing.assert_close(layer(x.flip(1, 2)), before, atol=1e-12, rtol=0)


def test_forward_reads_no_later_token_and_both_directions_read_all():
    for gates, later in (("forward", False), ("direction_wise", True), ("softmax", True)):
        layer = random_layer(gates=gates, local="none")
        x = random_map(1, 9, batch=1).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x)[0, 0, 4].sum(), x)
        reached = (grad != 0).any(-1)[0, 0]
        assert reached[:5].all()
        assert reached[5:].all() if later else not reached[5:].any()


def test_equal_gates_of_both_directions_are_the_shared_gate():
    both, one = random_layer(), random_layer(gates="shared")
    state = both.state_dict()
    half = len(state["gate.1.bias"]) // 2
    for name in ("gate.1.weight", "gate.1.bias"):
        state[name][half:] = state[name][:half]
    both.load_state_dict(state)
    one.load_state_dict(state | {name: state[name][:half] for name in state if "gate.1" in name})
    x = random_map()
    torch.testing.assert_close(both(x), one(x), atol=1e-14, rtol=0)


def test_softmax_is_torch_attention_on_the_layers_queries_keys_and_values():
    layer = random_layer(gates="softmax", local="none")
    u = random_map().flatten(1, 2)
    q, k, v = (
        p.unflatten(-1, (2, -1)).transpose(1, 2) for p in layer.qkv(u).split([12, 12, 24], -1)
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(layer.scan(u), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("bias", "path"), [(1e3, "norm_global"), (-1e3, "norm_local")])
def test_an_open_gate_is_global_only_and_a_shut_one_local_only(bias, path):
    layer = random_layer()
    nn.init.zeros_(layer.mix.weight)
    nn.init.constant_(layer.mix.bias, bias)
    u = layer.features(random_map())
    o = layer.scan(u)
    source = o if path == "norm_global" else u.unflatten(-1, (2, -1))
    expected = getattr(layer, path)(source)
    torch.testing.assert_close(layer.inject(u, o), expected, atol=1e-12, rtol=0)


def test_a_factor_on_the_global_path_is_lost_in_its_norm_where_epsilon_is():
    layer = random_layer()
    u, o = layer.features(random_map()), torch.randn(2, 15, 2, 12, dtype=torch.float64)
    large, larger = layer.inject(u, 1e3 * o), layer.inject(u, 2e3 * o)
    torch.testing.assert_close(larger, large, atol=1e-10, rtol=0)
    small, smaller = layer.norm_global(1e-6 * o), layer.norm_global(5e-7 * o)
    torch.testing.assert_close(smaller, small / 2, rtol=1e-5, atol=0)  # below epsilon


def test_log_gates_at_zero_logits_and_their_type():
    layer = BiGLA(config())
    nn.init.zeros_(layer.gate[1].weight)
    nn.init.zeros_(layer.gate[1].bias)
    with torch.autocast("cpu", torch.bfloat16):
        there, back = layer.log_gates(torch.randn(1, 4, 24))
    assert (there.shape, there.dtype) == ((1, 4, 2, 6), torch.float32)
    assert torch.equal(there, back)
    torch.testing.assert_close(there.exp(), torch.full_like(there, 0.5 ** (1 / 16)))
    assert there.exp().mean().item() == pytest.approx(0.958, abs=5e-4)


def test_a_layer_has_the_published_number_of_parameters():
    for d, heads in ((192, 3), (384, 6)):
        with torch.device("meta"):
            layer = BiGLA(ViGConfig(d_model=d, n_heads=heads))
        expected = 4 * d**2 + 32 * d + 9 * d + d + d + 2 * (d // heads)
        assert measure.parameters(layer) == expected


@pytest.mark.parametrize("name", SIZES)
def test_published_parameters_and_macs(name):
    with torch.device("meta"):
        model, images = create(name).eval(), torch.empty(1, 3, 224, 224)
    parameters, giga = SIZES[name]
    if parameters:
        assert measure.parameters(model) == parameters
    assert round(measure.parameters(model) / 1e6) == {"vig_t": 6, "vig_s": 23, "vig_b": 89}[name]
    without_scans = measure.flops(model, images) / 2 - macs_of_the_chunked_scans(model)
    assert without_scans / 1e9 == pytest.approx(giga, rel=5e-4)
    assert without_scans == macs_by_hand(model.config, 14**2)
    assert model.recurrence_macs(224) / 1e9 == pytest.approx(RECURRENCE[name], abs=0.005)


def test_one_direction_costs_half_the_recurrence_and_attention_none():
    with torch.device("meta"):
        both, one, none = (
            create("vig_t", gates=gates).recurrence_macs(1024)
            for gates in ("direction_wise", "forward", "softmax")
        )
    assert (both, none) == (2 * one, 0)
    assert one == 12 * 4096 * 2 * 3 * 32 * 64


def macs_of_the_chunked_scans(model):
    """What the operator's PyTorch form adds to a count; it is no figure of the paper."""
    layer = model.blocks[0].mixer
    u = torch.empty(1, 196, model.config.d_model, device="meta")
    linear = measure.flops(layer.qkv, u) + measure.flops(layer.gate, u)
    return model.config.depth * (measure.flops(layer.scan, u) - linear) / 2


def macs_by_hand(c, n):
    """Linear maps and convolutions, added up layer by layer."""
    d, f = c.d_model, {192: 512, 384: 1024, 768: 2048}[c.d_model]
    stem = 28**2 * 81 * 3 * d // 2 + n * 9 * d // 2 * d
    block = 9 * d + 2 * d**2 + 16 * d + 16 * d + d**2 + d**2 + 3 * d * f
    return stem + n * c.depth * block + d * c.n_classes


def test_tokens_of_the_stem():
    c = MODELS["vig_t"][1]
    assert [c.side(size) for size in (224, 448, 1024)] == [14, 28, 64]
    for strides, side in (((8, 2), 14), ((3, 1), 75), ((2, 2), 56)):
        changed = dataclasses.replace(c, d_model=4, n_heads=1, depth=1, strides=strides)
        model = ViG(changed)
        assert model.embed(torch.zeros(1, 3, 224, 224)).shape[1:3] == (side, side)
        assert changed.side(224) == side
    assert model.embed[0].kernel_size == (3, 3)
    assert ViG(dataclasses.replace(c, depth=1)).embed[0].kernel_size == (9, 9)


def test_positions_are_added_row_by_row_and_resized_bicubically():
    model = ViG(config(image_size=32, strides=(4, 2))).eval()
    side = model.config.side(32)
    images = torch.randn(1, 3, 32, 32)
    added = model.tokens(images) - model.embed(images)
    torch.testing.assert_close(added, model.positions.view(1, side, side, 24), atol=1e-6, rtol=0)
    large = torch.randn(1, 3, 64, 64)
    added = model.tokens(large) - model.embed(large)
    table = model.positions.view(1, side, side, 24).permute(0, 3, 1, 2)
    wide = F.interpolate(table, (2 * side, 2 * side), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(added, wide, atol=1e-6, rtol=0)
    assert model(large).shape == (1, 5)


@pytest.mark.parametrize("gates", ["direction_wise", "shared", "forward", "softmax"])
@pytest.mark.parametrize("local", ["injected", "convolution", "none"])
def test_every_parameter_of_every_variant_has_a_gradient(gates, local):
    torch.manual_seed(0)
    c = config(image_size=32, strides=(4, 2), gates=gates, local=local, drop_path=0.3)
    model = ViG(c)
    assert model.blocks[1].drop_path.rate == pytest.approx(0.3)
    model.eval()(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_of_the_layer_are_those_of_differences():
    layer = random_layer(d_model=8, n_heads=1)
    x = random_map(2, 2, d_model=8, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    model = ViG(config(image_size=32, strides=(4, 2))).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = model(images).float()
    exact = model(images)
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_initialisation_of_the_released_code():
    torch.manual_seed(0)
    model = ViG(ViGConfig(d_model=384, n_heads=6, depth=1, image_size=32))
    mixer, ffn = model.blocks[0].mixer, model.blocks[0].ffn
    for weight, fans in (
        (mixer.qkv.weight, 384 + 768),
        (mixer.gate[0].weight, 384 + 16),
        (mixer.gate[1].weight, 16 + 384),
        (mixer.mix.weight, 768),
        (mixer.out.weight, 768),
        (mixer.conv.weight, 9 + 9 * 384),
    ):
        bound = 2**-2.5 * math.sqrt(6 / fans)
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    for weight in (ffn.gate.weight, ffn.down.weight, model.classifier.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.1)
    for bias in (mixer.gate[1].bias, mixer.mix.bias, model.classifier.head.bias):
        assert not bias.any()
    assert model.embed[0].bias.any()  # the stem keeps torch's default
    assert model.no_weight_decay() == {"positions"}


def test_the_tagger_is_the_blocks_with_a_prediction_at_each_token():
    torch.manual_seed(0)
    c = config(in_channels=3, n_classes=2, local="none")
    model = ViGTagger(c, (2, 6)).eval()
    x = torch.randn(3, 2, 6, 3)
    inside = model.embed(x) + model.positions
    expected = model.head(model.norm(model.blocks(inside)))
    torch.testing.assert_close(model(x), expected)
    assert expected.shape == (3, 2, 6, 2)
    bare = ViGTagger(dataclasses.replace(c, positions=False), (2, 6))
    assert torch.equal(bare.tokens(x), bare.embed(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "multiple of 2 n_heads, both at least 1, got 24 and 5"),
        ({"gates": "two"}, "direction_wise"),
        ({"local": "conv"}, "convolution"),
        ({"image_size": 2}, r"2 pixels leave no token at strides \(8, 2\); give 7 or more"),
        ({"n_heads": 0}, "both at least 1, got 24 and 0"),
        ({"d_model": 0}, "both at least 1, got 0 and 2"),
        ({"mixer_eps": 0.0}, "mixer_eps must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_images_that_do_not_fit_are_refused():
    model = ViG(config(image_size=32, strides=(8, 2)))
    for shape in ((1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="4 pixels leave no token"):
        model(torch.zeros(1, 3, 32, 4))


def test_an_oblong_image_is_a_crop_of_the_stems_map_with_resized_positions():
    torch.manual_seed(0)
    model = ViG(config(image_size=32, strides=(4, 2))).eval()
    images = torch.randn(1, 3, 32, 64)
    side = model.config.side(32)
    table = model.positions.view(1, side, side, 24).permute(0, 3, 1, 2)
    wide = F.interpolate(table, (side, 2 * side), mode="bicubic").permute(0, 2, 3, 1)
    added = model.tokens(images) - model.embed(images)
    torch.testing.assert_close(added, wide, atol=1e-6, rtol=0)
    assert model(images).shape == (1, 5)


@pytest.mark.parametrize("strides", [(8, 2), (3, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("pixels", [7, 8, 31, 32, 33])
def test_tokens_of_a_side_are_the_stems(pixels, strides):
    c = config(strides=strides)
    stem = ViG(c).embed(torch.zeros(1, 3, pixels, 64))
    assert c.side(pixels) == stem.shape[1]


def test_a_small_epsilon_keeps_a_mixer_without_injection_alive_at_the_start():
    """With 1e-6 the norm scales o, about 1e-8 here, by 1,000, and the arm is mute."""
    torch.manual_seed(0)
    x, sizes = torch.randn(2, 8, 8, 128), {}
    for eps in (1e-6, 1e-16):
        layer = BiGLA(config(d_model=128, local="convolution", mixer_eps=eps))
        layer.apply(_initialise)
        sizes[eps] = layer(x).square().mean().sqrt().item()
    assert sizes[1e-6] < 1e-4 < 1e-1 < sizes[1e-16]
