"""ConViT: gated positional attention against loops, its limits, and the published sizes."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.layers.vision import SelfAttention
from gatebook.models.convit import (
    GPSA,
    MODELS,
    ConViT,
    ConViTConfig,
    displacements,
    nonlocality,
)

TINY = {"d_model": 8, "n_heads": 4, "depth": 3, "gpsa_layers": 2, "image_size": 8, "patch_size": 2}


def layer(d_model=12, n_heads=4, side=3, **changes):
    """A layer in float64 whose every parameter is random and asymmetric."""
    torch.manual_seed(0)
    attention = GPSA(d_model, n_heads, side, **changes)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention.double()


def convit(**changes):
    torch.manual_seed(0)
    return ConViT(ConViTConfig(**(TINY | {"n_classes": 5} | changes)))


def maps_by_loops(attention, x, side):
    """The map of each head for tokens `[N, C]`, one pair of patches at a time (Section 3)."""
    wq, wk, _ = (w.detach().numpy() for w in attention.qkv.weight.chunk(3))
    v_pos = attention.position.weight.detach().numpy()
    heads, d = attention.n_heads, x.shape[1] // attention.n_heads
    places = list(itertools.product(range(side), repeat=2))  # (row, column), row-major
    result = np.zeros((heads, len(places), len(places)))
    for h in range(heads):
        share = 1 / (1 + math.exp(-attention.gate[h].item()))
        rows = slice(h * d, (h + 1) * d)
        for i, (iy, ix) in enumerate(places):
            content, position = [], []
            for j, (jy, jx) in enumerate(places):
                content.append((wq[rows] @ x[i]) @ (wk[rows] @ x[j]) / math.sqrt(d))
                dx, dy = jx - ix, jy - iy
                position.append(v_pos[h] @ np.array([dx, dy, dx**2 + dy**2]))
            content, position = np.exp(content), np.exp(position)
            row = (1 - share) * content / content.sum() + share * position / position.sum()
            result[h, i] = row / row.sum()
    return result


def test_maps_and_output_equal_loops_over_pairs():
    attention, x = layer(), torch.randn(1, 9, 12, dtype=torch.float64)
    expected = maps_by_loops(attention, x[0].numpy(), 3)
    np.testing.assert_allclose(attention.weights(x)[0].detach().numpy(), expected, atol=1e-12)
    value = attention.qkv.weight.chunk(3)[2].detach().numpy()
    mixed = np.zeros((9, 12))
    for h in range(4):
        rows = slice(3 * h, 3 * h + 3)
        mixed[:, rows] = expected[h] @ (x[0].numpy() @ value[rows].T)
    out = attention.out
    y = mixed @ out.weight.detach().numpy().T + out.bias.detach().numpy()
    np.testing.assert_allclose(attention(x)[0].detach().numpy(), y, atol=1e-12)


def test_rows_of_the_map_sum_to_one():
    attention, x = layer(), torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(
        attention.weights(x).sum(-1), torch.ones(2, 4, 9).double(), atol=1e-12, rtol=0
    )


def test_a_closed_gate_is_ordinary_attention():
    attention, x = layer(), torch.randn(2, 9, 12, dtype=torch.float64)
    nn.init.constant_(attention.gate, -60)
    plain = nn.MultiheadAttention(12, 4, batch_first=True).double()
    plain.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": torch.zeros(36).double(),
            "out_proj.weight": attention.out.weight,
            "out_proj.bias": attention.out.bias,
        }
    )
    torch.testing.assert_close(attention(x), plain(x, x, x)[0], atol=1e-12, rtol=0)


def test_an_open_gate_ignores_content():
    attention = layer()
    nn.init.constant_(attention.gate, 60)
    one, two = torch.randn(2, 1, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(attention.weights(one), attention.weights(two), atol=1e-12, rtol=0)
    sums = attention(one) + attention(two) - attention.out.bias  # linear in the tokens
    torch.testing.assert_close(attention(one + two), sums, atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", [2, 5])
def test_displacements_are_key_minus_query_with_x_fast(side):
    delta = displacements(side)
    places = list(itertools.product(range(side), repeat=2))
    for (i, (iy, ix)), (j, (jy, jx)) in itertools.product(enumerate(places), repeat=2):
        assert delta[i, j].tolist() == [jx - ix, jy - iy]


@pytest.mark.parametrize("n_heads", [1, 4, 9, 16])
def test_positional_logits_start_as_squared_distances(n_heads):
    """Up to a constant of each query, `-alpha |delta - Delta|^2` with the centres of the code."""
    attention, k = GPSA(2 * n_heads, n_heads, side=5).double(), math.isqrt(n_heads)
    attention.start_as_convolution(0.7)
    for a, b in itertools.product(range(k), repeat=2):
        centre = torch.tensor([b - (k - 1) / 2, a - (k - 1) / 2])
        logits = -0.7 * (displacements(5) - centre).square().sum(-1)
        expected = logits.double().softmax(-1)
        torch.testing.assert_close(attention.positions()[a + k * b], expected, atol=1e-7, rtol=0)
    assert torch.equal(attention.qkv.weight.chunk(3)[2], torch.eye(2 * n_heads).double())


def convolution_limit(side=6, channels=18):
    """A layer of nine sharp heads, and the 3 x 3 kernel that its output projection is."""
    attention = layer(channels, 9, side)
    nn.init.constant_(attention.gate, 40)
    attention.start_as_convolution(50)
    kernel, d = torch.zeros(channels, channels, 3, 3).double(), channels // 9
    for a, b in itertools.product(range(3), repeat=2):
        columns = slice((a + 3 * b) * d, (a + 3 * b + 1) * d)
        kernel[:, columns, a, b] = attention.out.weight[:, columns].detach()
    return attention, kernel


def test_convolution_limit_equals_conv2d_inside_and_repeats_the_border():
    attention, kernel = convolution_limit()
    image = torch.randn(1, 18, 6, 6, dtype=torch.float64)
    y = attention(image.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))
    bias = attention.out.bias
    torch.testing.assert_close(
        y[..., 1:-1, 1:-1], F.conv2d(image, kernel, bias), atol=1e-12, rtol=0
    )
    repeated = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, bias)
    torch.testing.assert_close(y, repeated, atol=1e-12, rtol=0)
    zeros = F.conv2d(image, kernel, bias, padding=1)
    assert (y - zeros)[..., 0, :].abs().max() > 0.1


@pytest.mark.parametrize("flip", [2, 3])
def test_the_convolution_limit_tells_a_filter_from_its_mirror_image(flip):
    attention, kernel = convolution_limit()
    image = torch.randn(1, 18, 6, 6, dtype=torch.float64)
    y = attention(image.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))
    mirrored = F.conv2d(image, kernel.flip(flip), attention.out.bias)
    assert (y[..., 1:-1, 1:-1] - mirrored).abs().max() > 0.1


def test_equidistant_patches_share_the_weight_for_an_even_side():
    attention = GPSA(8, 4, side=4).double()
    attention.start_as_convolution(50)
    inner = attention.positions()[0].unflatten(0, (4, 4))[1, 2].unflatten(0, (4, 4))
    expected = torch.zeros(4, 4).double()
    expected[0:2, 1:3] = 0.25  # centre (-1/2, -1/2) of row 1, column 2
    torch.testing.assert_close(inner, expected, atol=1e-12, rtol=0)


def test_heads_beyond_a_square_keep_their_positions():
    attention = GPSA(12, 6, side=3)
    before = attention.position.weight.clone()
    attention.start_as_convolution(1.0)
    assert torch.equal(attention.position.weight[4:], before[4:])
    assert not torch.equal(attention.position.weight[:4], before[:4])


def test_the_bias_of_the_positional_logits_changes_nothing():
    attention, x = layer(), torch.randn(2, 9, 12, dtype=torch.float64)
    before = attention(x)
    before.square().sum().backward()
    assert attention.position.bias.grad.abs().max() < 1e-12
    nn.init.normal_(attention.position.bias)
    torch.testing.assert_close(attention(x), before, atol=1e-12, rtol=0)


def test_gates_are_one_number_for_each_head():
    attention, x = layer(), torch.randn(1, 9, 12, dtype=torch.float64)
    before = attention.weights(x)
    with torch.no_grad():
        attention.gate[2] += 1
    changed = (attention.weights(x) - before).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False]


def test_nonlocality_by_loops():
    weights = torch.rand(2, 3, 9, 9).double().softmax(-1)
    expected = torch.zeros(2, 3).double()
    places = list(itertools.product(range(3), repeat=2))
    for (i, p), (j, q) in itertools.product(enumerate(places), repeat=2):
        expected += weights[:, :, i, j] * math.dist(p, q) / 9
    torch.testing.assert_close(nonlocality(weights, 3), expected, atol=1e-6, rtol=0)


CARD = {"convit_ti": (5_710_512, 1.252), "convit_s": (27_777_322, 5.747)}


@pytest.mark.parametrize("name", CARD)
def test_released_parameters_and_macs(name):
    """The released code stores the mixed map, so it mixes the values once: N^2 C a layer less."""
    with torch.device("meta"):
        model, images = models.create(name).eval(), torch.empty(1, 3, 224, 224)
    second_mix = 10 * 196**2 * model.config.d_model
    macs = measure.flops(model, images) // 2 - second_mix
    assert (measure.parameters(model), round(macs / 1e9, 3)) == CARD[name]


def sizes_by_hand(c):
    """Parameters and multiply-adds of a configuration, added up layer by layer."""
    n, d, h = c.side**2, c.d_model, c.n_heads
    block = 4 * d * d + d + 8 * d * d + 5 * d + 4 * d  # attention, MLP, two norms
    parameters = 768 * d + d + n * d + d + c.depth * block + c.gpsa_layers * 5 * h
    parameters += 2 * d + (d + 1) * c.n_classes
    macs = n * 768 * d + d * c.n_classes
    for index in range(c.depth):
        gpsa = index < c.gpsa_layers
        tokens = n if gpsa else n + 1
        macs += 12 * tokens * d * d + 2 * tokens**2 * d
        macs += gpsa * (3 * h * n * n + n * n * d)  # positional logits, and their mix of values
    return parameters, macs


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_every_configuration(name, plain):
    with torch.device("meta"):
        model = models.create(name, **({"gpsa_layers": 0} if plain else {})).eval()
        images = torch.empty(1, 3, 224, 224)
    found = measure.parameters(model), measure.flops(model, images) // 2
    assert found == sizes_by_hand(model.config)


@pytest.mark.parametrize(("name", "fewer"), [("convit_ti", 200), ("convit_s", 450)])
def test_gpsa_adds_five_numbers_a_head(name, fewer):
    with torch.device("meta"):
        both = [models.create(name, gpsa_layers=layers) for layers in (10, 0)]
    assert measure.parameters(both[0]) - measure.parameters(both[1]) == fewer


def test_model_is_its_parts():
    model, x = convit().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tokens = model.embed(x).flatten(1, 2) + model.positions
    for index, block in enumerate(model.blocks):
        assert type(block.attention) is (GPSA if index < 2 else SelfAttention)
        if index == 2:
            tokens = torch.cat([model.class_token.expand(2, 1, 8), tokens], 1)
        tokens = tokens + block.attention(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    expected = model.classifier.head(model.classifier.norm(tokens[:, 0]))
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)


def test_maps_leave_the_class_token_to_the_last_blocks():
    model, x = convit(), torch.randn(2, 3, 8, 8)
    assert [list(a.shape) for a in model.attention_maps(x)] == [
        [2, 4, 16, 16],
        [2, 4, 16, 16],
        [2, 4, 17, 17],
    ]
    assert model.gates().shape == (2, 4)
    torch.testing.assert_close(model.gates(), torch.full((2, 4), 0.731059), atol=1e-6, rtol=0)
    assert model.no_weight_decay() == {"class_token", "positions"}


def test_without_a_class_token_the_mean_is_read():
    model, x = convit(class_token=False), torch.randn(2, 3, 8, 8)
    expected = model.classifier.head(model.classifier.norm(model.tokens(x)[-1]).mean(1))
    torch.testing.assert_close(model(x), expected)
    assert model.no_weight_decay() == {"positions"}


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"gpsa_layers": 0}])
def test_every_parameter_gets_a_gradient(changes):
    model = convit(**changes)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("position.bias"):  # which cancels in the softmax
            assert parameter.grad.any(), name


def test_arms_of_table_3():
    frozen = convit(gate=0.0, train_gate=False)
    assert frozen.gates().eq(0.5).all()
    assert not any(block.attention.gate.requires_grad for block in frozen.blocks[:2])
    start, random = (convit(local_init=local).blocks[0].attention for local in (True, False))
    assert torch.equal(start.qkv.weight.chunk(3)[2], torch.eye(8))
    assert random.qkv.weight.abs().max() < 0.1
    assert random.position.weight.abs().max() < 0.1
    assert random.gate.eq(1).all()


def test_initialisation_of_the_released_code():
    torch.manual_seed(0)
    model = ConViT(dataclasses.replace(MODELS["convit_ti"][1], depth=3, gpsa_layers=2))
    for block in model.blocks:
        q, k, v = block.attention.qkv.weight.chunk(3)
        for weight in (q, k, block.attention.out.weight, block.mlp[0].weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not block.attention.out.bias.any()
    assert v.std().item() == pytest.approx(0.02, rel=0.05)  # of the last block, without positions
    assert not model.blocks[0].attention.position.bias.any()
    assert model.blocks[2].drop_path.rate == pytest.approx(0.1)
    assert model.blocks[0].drop_path.rate == 0
    wide = convit(d_model=400, init_std=0.1)
    assert wide.blocks[0].mlp[0].weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert wide.blocks[0].attention.qkv.weight[:800].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size 9 is not a multiple of patch_size 2"),
        ({"gpsa_layers": 3}, "gpsa_layers=3 must be 0 to 2: .* the class token needs one"),
        ({"gpsa_layers": 4, "class_token": False}, "gpsa_layers=4 must be 0 to 3: .* 3 blocks$"),
        ({"gpsa_layers": -1}, "gpsa_layers=-1 must be 0 to 2"),
        ({"n_heads": 3}, "n_heads=3 must be at least 1 and divide d_model=8"),
        ({"n_heads": 0}, "n_heads=0 must be at least 1 and divide d_model=8"),
        ({"drop_path": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        convit(**changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 16, 16\]; expected \[B, 3, 8, 8\]"):
        convit()(torch.zeros(1, 3, 16, 16))


def test_tokens_of_another_map_are_refused():
    attention = layer()
    for call in (attention, attention.weights):
        with pytest.raises(ValueError, match="16 tokens; this layer has positions for 9"):
            call(torch.randn(1, 16, 12, dtype=torch.float64))


def test_a_plain_model_has_no_gates():
    with pytest.raises(ValueError, match="gpsa_layers=0 has no gates"):
        convit(gpsa_layers=0).gates()


def test_maps_and_logits_under_autocast():
    model, x = convit(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected, logits = model.attention_maps(x), model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.attention_maps(x)
            torch.testing.assert_close(model(x).float(), logits, atol=0.02, rtol=0.1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.02, rtol=0)
