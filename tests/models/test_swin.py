"""Swin: every part against an oracle that knows no roll, no mask and no fused projection."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gatebook.models.swin import (
    MODELS,
    PatchMerging,
    SwinBlock,
    SwinConfig,
    SwinTransformer,
    WindowAttention,
    relative_position_index,
    shift_mask,
)


def random_block(height, width, window_size, shift, d_model=8, n_heads=2, relative_bias=True):
    """A block in float64 whose every parameter is random and asymmetric."""
    block = SwinBlock(d_model, n_heads, height, width, window_size, shift, relative_bias)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.double()


def cell(y, x, side, shift):
    """The window that holds the token: a grid of cells, moved down and right by the shift."""
    return math.floor((y - shift) / side), math.floor((x - shift) / side)


def attention_by_loops(block, x):
    """Window attention of the map `[h, w, C]`, one query, key and head at a time (Eq. 4)."""
    layer, side = block.attention, block.window_size
    weight, bias = layer.qkv.weight.detach().numpy(), layer.qkv.bias.detach().numpy()
    table = None if layer.bias_table is None else layer.bias_table.detach().numpy()
    height, width, channels = x.shape
    d = channels // layer.n_heads
    places = list(itertools.product(range(height), range(width)))
    mixed = np.zeros((height, width, channels))
    for (qy, qx), head in itertools.product(places, range(layer.n_heads)):
        rows = slice(head * d, (head + 1) * d)
        q, k, v = (
            [weight[i * channels :][rows] @ x[p] + bias[i * channels :][rows] for p in places]
            for i in range(3)
        )
        query, logits, values = q[places.index((qy, qx))], [], []
        for number, (ky, kx) in enumerate(places):
            if cell(qy, qx, side, block.shift) != cell(ky, kx, side, block.shift):
                continue
            logit = query @ k[number] / math.sqrt(d)
            if table is not None:
                row = (qy - ky + side - 1) * (2 * side - 1) + (qx - kx + side - 1)
                logit += table[row, head]
            logits.append(logit)
            values.append(v[number])
        weights = np.exp(np.array(logits) - max(logits))
        mixed[qy, qx, rows] = weights @ np.array(values) / weights.sum()
    return mixed @ layer.proj.weight.detach().numpy().T + layer.proj.bias.detach().numpy()


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 2), (6, 9, 3), (8, 4, 4)])
def test_attention_equals_loops_over_pixels(height, width, side, shift, relative_bias):
    torch.manual_seed(0)
    block = random_block(height, width, side, shift, relative_bias=relative_bias)
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    expected = attention_by_loops(block, x[0].numpy())
    np.testing.assert_allclose(block.attend(x)[0].detach().numpy(), expected, atol=1e-12)


def test_the_oracle_tells_query_minus_key_from_key_minus_query():
    torch.manual_seed(0)
    block = random_block(4, 4, 2, shift=True)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    block.attention.index = block.attention.index.T.contiguous()
    expected = attention_by_loops(block, x[0].numpy())
    assert np.abs(block.attend(x)[0].detach().numpy() - expected).max() > 1e-2


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_relative_position_index_reads_query_minus_key(side):
    index = relative_position_index(side)
    for (q, (qy, qx)), (k, (ky, kx)) in itertools.product(
        enumerate(itertools.product(range(side), repeat=2)), repeat=2
    ):
        assert index[q, k] == (qy - ky + side - 1) * (2 * side - 1) + (qx - kx + side - 1)
    assert index.unique().numel() == (2 * side - 1) ** 2


def test_cyclic_shift_moves_each_pixel_up_and_left_and_back():
    """With attention replaced by the identity, windows hold pixel (y + s, x + s) modulo the map."""
    block = random_block(6, 4, 2, shift=True)
    seen = []
    block.attention.forward = lambda windows, mask: seen.append(windows) or windows
    x = torch.arange(24.0).reshape(1, 6, 4, 1)
    assert torch.equal(block.attend(x), x)
    for y, column in itertools.product(range(6), range(4)):
        window, token = (y // 2) * 2 + column // 2, (y % 2) * 2 + column % 2
        assert seen[0][0, window, token, 0] == x[0, (y + 1) % 6, (column + 1) % 4, 0]


@pytest.mark.parametrize(("height", "width", "side", "shift"), [(4, 6, 2, 1), (14, 7 * 3, 7, 3)])
def test_mask_keeps_apart_what_the_roll_brought_together(height, width, side, shift):
    mask = shift_mask(height, width, side, shift)
    assert mask.shape == (height * width // side**2, side**2, side**2)
    tokens = list(itertools.product(range(side), repeat=2))
    windows = itertools.product(range(height // side), range(width // side))
    for number, (row, column) in enumerate(windows):
        places = [  # coordinates in the image of the window's tokens
            ((row * side + y + shift) % height, (column * side + x + shift) % width)
            for y, x in tokens
        ]
        for (q, query), (k, key) in itertools.product(enumerate(places), repeat=2):
            together = abs(query[0] - key[0]) < side and abs(query[1] - key[1]) < side
            assert mask[number, q, k] == (0 if together else float("-inf"))


@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 2), (6, 9, 3), (8, 8, 4)])
def test_masked_cyclic_shift_equals_padding(height, width, side):
    """Section 3.2: pad to (h/M + 1) x (w/M + 1) windows and mask the padded keys."""
    torch.manual_seed(0)
    block = random_block(height, width, side, shift=True)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    before, after = side - block.shift, block.shift
    padded = F.pad(x, (0, 0, before, after, before, after), value=7.0)
    real = F.pad(torch.ones(height, width), (before, after, before, after)).bool()
    result = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], side):
        for left in range(0, padded.shape[2], side):
            there = real[top : top + side, left : left + side].flatten()
            mask = torch.zeros(1, side**2, side**2).masked_fill(~there, float("-inf"))
            window = padded[:, top : top + side, left : left + side].flatten(1, 2)[:, None]
            mixed = block.attention(window, mask.double())[:, 0]
            result[:, top : top + side, left : left + side] = mixed.unflatten(1, (side, side))
    cropped = result[:, before : before + height, before : before + width]
    torch.testing.assert_close(block.attend(x), cropped, atol=1e-12, rtol=0)


def plain_attention(layer, x, bias=None):
    """torch's own multi-head attention with the layer's weights, over `[B, N, C]`."""
    reference = nn.MultiheadAttention(x.shape[-1], layer.n_heads, batch_first=True).double()
    reference.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight,
            "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight,
            "out_proj.bias": layer.proj.bias,
        }
    )
    mask = None if bias is None else bias.repeat(x.shape[0], 1, 1)
    return reference(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("window_size", [4, 9])
def test_a_window_as_large_as_the_map_is_global_attention(window_size):
    torch.manual_seed(0)
    block = random_block(4, 4, window_size, shift=True)
    assert (block.window_size, block.shift) == (4, 0)
    x = torch.randn(3, 4, 4, 8, dtype=torch.float64)
    bias = block.attention.relative_bias()
    expected = plain_attention(block.attention, x.flatten(1, 2), bias).unflatten(1, (4, 4))
    torch.testing.assert_close(block.attend(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("remove", ["zero table", "no table"])
def test_without_bias_a_window_is_multi_head_attention(remove):
    torch.manual_seed(0)
    layer = WindowAttention(12, n_heads=3, window_size=3, relative_bias=remove == "zero table")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    if remove == "zero table":
        nn.init.zeros_(layer.bias_table)
    layer = layer.double()
    x = torch.randn(2, 5, 9, 12, dtype=torch.float64)
    expected = plain_attention(layer, x.flatten(0, 1)).unflatten(0, (2, 5))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def reach(module, height, width, d_model=4):
    """Which input token moves which output token: `[h, w, h, w]`, output first."""
    torch.manual_seed(0)
    x = torch.randn(1, height, width, d_model, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x)[0, :, :, :, 0]
    return (jacobian != 0).any(dim=2).any(dim=-1)


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_reaches_its_own_windows_and_nothing_else(shift):
    height, width, side = 6, 9, 3
    block = random_block(height, width, side, shift, d_model=4)
    reached = reach(block, height, width)
    for qy, ky in itertools.product(range(height), repeat=2):
        for qx, kx in itertools.product(range(width), repeat=2):
            together = cell(qy, qx, side, block.shift) == cell(ky, kx, side, block.shift)
            assert reached[qy, qx, ky, kx] == together


def test_a_shifted_block_joins_neighbouring_windows_but_not_opposite_edges():
    side = height = 4
    reached = reach(random_block(2 * height, 2 * height, side, shift=True, d_model=4), 8, 8)
    assert reached[side - 1, 2, side, 2]
    assert reached[2, side - 1, 2, side]
    assert not reached[0, :, -1].any()
    assert not reached[:, 0, :, -1].any()


def test_two_unshifted_blocks_reach_no_further_than_one():
    one = random_block(4, 4, 2, shift=False, d_model=4)
    two = nn.Sequential(one, random_block(4, 4, 2, shift=False, d_model=4))
    assert torch.equal(reach(one, 4, 4), reach(two, 4, 4))
    shifted = nn.Sequential(one, random_block(4, 4, 2, shift=True, d_model=4))
    assert reach(shifted, 4, 4)[1, 1].all()  # an inner token now sees the whole map


def test_merging_joins_neighbours_in_the_released_order():
    merge = PatchMerging(3)
    seen = []
    merge.norm.forward = lambda x: seen.append(x) or x
    x = torch.randn(2, 4, 6, 3)
    assert merge(x).shape == (2, 2, 3, 6)
    expected = torch.cat(
        [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1
    )
    assert torch.equal(seen[0], expected)


SIZES = {  # parameters, matrix and convolution multiply-adds; the released code, built and counted
    "swin_t": (28_288_354, 4_490_566_656),
    "swin_b": (87_768_224, 15_430_946_816),
}


def on_meta(name):
    cls, config = MODELS[name]
    with torch.device("meta"):
        return cls(config).eval()


def macs_on_meta(model):
    side = model.config.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", SIZES)
def test_published_parameters_and_macs(name):
    model = on_meta(name)
    assert (sum(p.numel() for p in model.parameters()), macs_on_meta(model)) == SIZES[name]


def parameters_by_hand(c):
    """Parameters of a configuration, added up layer by layer."""
    total = 3 * c.patch_size**2 * c.d_model + 3 * c.d_model  # patches: weight, bias, norm
    for stage, (depth, heads) in enumerate(zip(c.depths, c.n_heads, strict=True)):
        width, side = c.stage_width(stage), min(c.window_size, c.stage_side(stage))
        linear = (3 + 1 + 4 + 4) * width**2 + (3 + 1 + 4 + 1) * width
        total += depth * (linear + 4 * width + (2 * side - 1) ** 2 * heads)
        if stage < 3:
            total += 8 * width + 8 * width**2
    return total + 2 * width + (width + 1) * c.n_classes


def macs_by_hand(c):
    """Multiply-adds: Eq. 2 for the attention, and every other matrix product."""
    tokens = c.stage_side(0) ** 2
    total = tokens * 3 * c.patch_size**2 * c.d_model
    for stage, depth in enumerate(c.depths):
        width, tokens = c.stage_width(stage), c.stage_side(stage) ** 2
        window = min(c.window_size, c.stage_side(stage)) ** 2
        attention = 4 * tokens * width**2 + 2 * window * tokens * width
        total += depth * (attention + 8 * tokens * width**2)
        if stage < 3:
            total += tokens // 4 * 8 * width**2
    return total + width * c.n_classes


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_macs_equal_the_formula(name):
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == parameters_by_hand(model.config)
    assert macs_on_meta(model) == macs_by_hand(model.config)


def test_the_last_stage_never_shifts_at_224():
    shifts = [[block.shift for block in stage] for stage in on_meta("swin_t").stages]
    assert shifts == [[0, 3], [0, 3], [0, 3] * 3, [0, 0]]


def test_variants_of_the_experiment():
    config = dataclasses.replace(MODELS["swin_t"][1], shift=False)
    with torch.device("meta"):
        unshifted = SwinTransformer(config)
        no_position = SwinTransformer(dataclasses.replace(config, relative_bias=False))
        whole = SwinTransformer(dataclasses.replace(config, window_size=56))
    assert not any(block.shift for stage in unshifted.stages for block in stage)
    assert not no_position.no_weight_decay()
    assert [stage[0].window_size for stage in whole.stages] == [56, 28, 14, 7]
    assert len(unshifted.no_weight_decay()) == sum(config.depths)


def tiny(**changes):
    sizes = {"d_model": 8, "depths": (2, 2), "n_heads": (2, 4), "window_size": 2, "image_size": 16}
    return SwinTransformer(SwinConfig(**{**sizes, "n_classes": 5, **changes}))


def test_stage_shapes_and_gradients():
    torch.manual_seed(0)
    model = tiny(drop_path=0.3)
    maps = model.features(torch.randn(2, 3, 16, 16))
    assert [list(m.shape) for m in maps] == [[2, 4, 4, 8], [2, 2, 2, 16]]
    model.eval()(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.stages[1][1].drop_path.rate == pytest.approx(0.3)
    assert model.stages[0][0].drop_path.rate == 0


def test_initialisation_of_the_released_code():
    torch.manual_seed(0)
    cls, config = MODELS["swin_t"]
    model = cls(dataclasses.replace(config, depths=(2, 2, 2, 2)))
    block = model.stages[2][1]
    for weight in (
        block.mlp[0].weight,
        block.attention.bias_table,
        model.merges[0].reduction.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.attention.qkv.bias.any()
    assert model.embed.proj.weight.std().item() > 0.05  # the convolution keeps torch's default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 4"),
        ({"image_size": 20, "window_size": 5}, "odd side and can't be merged"),
        ({"image_size": 24, "window_size": 4}, "multiple of 32"),
        ({"n_heads": (3, 4)}, "8 channels, 3 heads"),
        ({"depths": (2, 2, 2)}, "3 depths but 2 numbers of heads"),
        ({"drop_path": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 32\]; expected \[B, 3, 16, 16\]"):
        tiny()(torch.zeros(1, 3, 32, 32))
