"""Gated-SwinRMT: every part against loops over pixels and the identities of its ingredients."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.models.gated_swinrmt import (
    MODELS,
    Block,
    FeedForward,
    GatedRetention,
    GatedSwinRMT,
    GatedSwinRMTConfig,
    balanced_slopes,
    log_decays,
)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def random_layer(side, *, d_model=8, n_heads=2, **choices):
    """A layer whose every parameter is random."""
    layer = GatedRetention(d_model, n_heads, side, **choices)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


# ------------------------------------------------------- the oracle: one number at a time


def affine(layer, x):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def logistic(z):
    return 1 / (1 + np.exp(-z))


def line(layer, head, places, queries, keys, values, length):
    """One pass along one line of tokens at `places`: the equations, query by query."""
    n_heads, d = layer.n_heads, queries.shape[1]
    gamma = 1 - 2 ** (-2 - 4 * head / n_heads)
    half = n_heads // 2
    slope = -(2.0 ** -(head + 1)) if head < half else 2.0 ** -(head - half + 1)
    mixed = np.zeros_like(values)
    for i, at in enumerate(places):
        apart = np.array([abs(at - other) for other in places])
        logits = np.array([queries[i] @ key for key in keys]) / math.sqrt(d)
        if layer.scores == "softmax":
            weights = np.exp(logits) * gamma**apart
            weights /= weights.sum()
        else:
            weights = logistic(logits + slope * apart) * gamma**apart / length
        mixed[i] = weights @ values
    return mixed


def pieces(side, window, shift):
    """The windows' extents along an axis, narrow ones included."""
    if not window:
        return [range(side)]
    cuts = sorted({0, side, *range(shift, side, window)})
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def by_loops(layer, x):
    """The layer's output for a map `[h, w, C]`."""
    side, c = x.shape[0], x.shape[2]
    d = c // layer.n_heads
    q, k, v = np.split(affine(layer.qkv, x), 3, axis=-1)
    if layer.value_gate is not None:
        u = affine(layer.value_gate, x)
        v = v * u * logistic(u)
    z = np.zeros_like(v)
    length = layer.window_size or side
    extents = pieces(side, layer.window_size, layer.shift)
    for head, rows, columns in itertools.product(range(layer.n_heads), extents, extents):
        part = slice(head * d, (head + 1) * d)
        between = v[..., part].copy()
        for y in rows:
            at = [(y, x_) for x_ in columns]
            qs, ks, vs = (np.array([t[p][part] for p in at]) for t in (q, k, v))
            for p, value in zip(at, line(layer, head, columns, qs, ks, vs, length), strict=True):
                between[p] = value
        for x_ in columns:
            at = [(y, x_) for y in rows]
            qs, ks = (np.array([t[p][part] for p in at]) for t in (q, k))
            vs = np.array([between[p] for p in at])
            for p, value in zip(at, line(layer, head, rows, qs, ks, vs, length), strict=True):
                z[p][part] = value
    weight, bias = (t.detach().numpy() for t in (layer.lce.weight, layer.lce.bias))
    for y, x_ in itertools.product(range(side), repeat=2):
        z[y, x_] += bias
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            if 0 <= y + dy < side and 0 <= x_ + dx < side:
                z[y, x_] += weight[:, 0, dy + 2, dx + 2] * v[y + dy, x_ + dx]
    if layer.gate is not None:
        gates = logistic(affine(layer.gate, x))
        z = z * np.repeat(gates, c // gates.shape[-1], axis=-1)
    return affine(layer.out, z)


CHOICES = {
    "retention": {"gate": "elementwise"},
    "one gate a head": {"gate": "head"},
    "swat": {"scores": "sigmoid", "value_gate": True},
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("side", "window"), [(4, 2), (6, 3), (8, 4), (5, 0), (4, 7)])
@pytest.mark.parametrize("name", CHOICES)
def test_layer_equals_loops_over_pixels(name, side, window, shift):
    layer = random_layer(side, window_size=window, shift=shift, **CHOICES[name])
    x = torch.randn(1, side, side, 8)
    expected = by_loops(layer, x[0].numpy())
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), expected, atol=1e-12)


def spoil_decay_as_logit(layer):
    layer.slope, layer.decay = layer.slope + layer.decay.log(), torch.ones_like(layer.decay)


FAULTS = {
    "the decay added to sigmoid logits": ("swat", spoil_decay_as_logit),
    "log gamma as a factor": ("swat", lambda m: m.decay.copy_(m.decay.log())),
    "slopes of one sign": ("swat", lambda m: m.slope.copy_(-m.slope.abs())),
    "no mask by columns": ("retention", lambda m: m.columns_apart.fill_(False)),
    "no mask by rows": ("swat", lambda m: m.rows_apart.fill_(False)),
    "masks of the axes exchanged": (
        "retention",
        lambda m: setattr(m, "rows_apart", m.columns_apart),
    ),
    "heads' gates in another order": (
        "one gate a head",
        lambda m: setattr(m, "gates", lambda x: m.gate(x).sigmoid().repeat(1, 1, 1, 4)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_catches(fault):
    name, spoil = FAULTS[fault]
    layer = random_layer(6, window_size=3, shift=True, **CHOICES[name])
    spoil(layer)
    x = torch.randn(1, 6, 6, 8)
    difference = layer(x)[0].detach().numpy() - by_loops(layer, x[0].numpy())
    assert np.abs(difference).max() > 1e-3


def test_the_oracle_catches_local_context_on_the_shifted_map():
    layer = random_layer(6, window_size=3, shift=True)
    x = torch.randn(1, 6, 6, 8)
    plain = layer.lce.forward
    layer.lce.forward = lambda v: plain(v.roll((-1, -1), (1, 2))).roll((1, 1), (1, 2))
    assert np.abs(layer(x)[0].detach().numpy() - by_loops(layer, x[0].numpy())).max() > 1e-3


# ------------------------------------------------------- identities


def test_decays_and_slopes_by_hand():
    gammas = log_decays(4, 2, 4).exp().tolist()
    assert gammas == pytest.approx([0.75, 0.875, 0.9375, 0.96875], abs=1e-15)
    assert balanced_slopes(4).tolist() == [-0.5, -0.25, 0.5, 0.25]


def manhattan(side):
    tokens = list(itertools.product(range(side), repeat=2))
    return torch.tensor([[abs(a - c) + abs(b - d) for c, d in tokens] for a, b in tokens])


def passes(layer, side):
    """What both passes do to V with Q = K = 0, `[H, N, N]`: from token to token."""
    n, d = side * side, 8 // layer.n_heads
    v = torch.eye(n).reshape(n, side, side, 1).expand(-1, -1, -1, 8)
    y = layer.attend(torch.zeros_like(v), torch.zeros_like(v), v)  # one source token an image
    return y[..., ::d].permute(3, 1, 2, 0).flatten(1, 2)


def test_two_passes_decay_with_the_manhattan_distance():
    layer = GatedRetention(8, 2, 5, scores="sigmoid")
    layer.slope.zero_()
    gammas = log_decays(2, 2, 4).exp()[:, None, None]
    kernel = passes(layer, 5) * (2 * 5) ** 2  # sigmoid(0) = 1/2, and 1/M, in each pass
    torch.testing.assert_close(kernel, gammas ** manhattan(5), atol=1e-14, rtol=0)


def test_two_softmax_passes_decay_with_the_manhattan_distance_up_to_normalisation():
    kernel = passes(GatedRetention(8, 2, 5), 5)
    own = kernel.diagonal(dim1=-2, dim2=-1)[..., None]  # a row's normalisation
    gammas = log_decays(2, 2, 4).exp()[:, None, None]
    torch.testing.assert_close(kernel / own, gammas ** manhattan(5), atol=1e-14, rtol=0)


def test_half_of_swats_heads_prefer_far_tokens_at_equal_scores():
    layer = GatedRetention(16, 4, 7, scores="sigmoid")
    q = torch.zeros(1, 7, 7, 16)
    scores = layer.weights(*(layer._split(q),) * 2)[0, 0, :, 0, 0]  # [H, n]: from the first token
    assert (scores.argmax(-1) == 0).tolist() == [True, True, False, False]


def test_full_attention_decays_with_the_manhattan_distance():
    layer = GatedRetention(8, 2, 4, full=True)
    logits = log_decays(2, 2, 4)[:, None, None] * manhattan(4)
    torch.testing.assert_close(passes(layer, 4), logits.softmax(-1), atol=1e-14, rtol=0)


def test_full_attention_is_masked_multi_head_attention():
    layer = random_layer(4, full=True)
    q, k, v = torch.randn(3, 2, 4, 4, 8)
    heads = [t.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
    bias = log_decays(2, 2, 4)[:, None, None] * manhattan(4)
    expected = F.scaled_dot_product_attention(*heads, attn_mask=bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(
        layer.attend(q, k, v), expected.unflatten(1, (4, 4)), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("window", [8, 9])
@pytest.mark.parametrize("name", CHOICES)
def test_a_window_that_covers_the_map_changes_no_bit(name, window):
    torch.set_default_dtype(torch.float32)
    covered = random_layer(8, window_size=window, shift=True, **CHOICES[name])
    whole = GatedRetention(8, 2, 8, **CHOICES[name])
    whole.load_state_dict(covered.state_dict())
    x = torch.randn(3, 8, 8, 8)
    assert torch.equal(covered(x), whole(x))
    cut = GatedRetention(8, 2, 8, window_size=4, **CHOICES[name])
    cut.load_state_dict(covered.state_dict())
    assert (cut(x) - whole(x)).abs().max() > 1e-2


def test_small_maps_collapse_the_whole_model():
    """32x32 pixels and a stem of 4: maps of 8, 4, 2 and 1, all inside a window of 8."""
    windows, whole = (tiny(window_size=size, image_size=32) for size in (8, 0))
    whole.load_state_dict(windows.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(windows.eval()(images), whole.eval()(images))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_gate_of_plus_or_minus_30(scores):
    open_, shut, none = (
        random_layer(4, scores=scores, gate=gate) for gate in ("elementwise", "elementwise", "none")
    )
    for layer, bias in ((open_, 30.0), (shut, -30.0)):
        layer.load_state_dict(none.state_dict(), strict=False)
        nn.init.zeros_(layer.gate.weight)
        nn.init.constant_(layer.gate.bias, bias)
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(open_(x), none(x), atol=1e-11, rtol=0)
    torch.testing.assert_close(shut(x), none.out.bias.expand(2, 4, 4, 8), atol=1e-11, rtol=0)


def test_without_decay_positions_do_not_matter():
    order = torch.randperm(6)
    for start, same in ((60.0, True), (2.0, False)):
        layer = random_layer(6, decay_start=start)
        q, k, v = torch.randn(3, 1, 6, 6, 8)
        y = layer.attend(q, k, v)
        for axis in (1, 2):
            moved = layer.attend(*(t.index_select(axis, order) for t in (q, k, v)))
            gap = (moved - y.index_select(axis, order)).abs().max().item()
            assert (gap < 1e-13) == same


def test_with_full_decay_each_token_sees_itself():
    layer = random_layer(6, decay_start=1e-12, decay_span=0.0)
    q, k, v = 0.1 * torch.randn(3, 1, 6, 6, 8)
    torch.testing.assert_close(layer.attend(q, k, v), v, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shift", [False, True])
def test_softmax_returns_constant_values_and_sigmoid_may_shrink_them(shift):
    q, k = 3 * torch.randn(2, 1, 6, 6, 8)
    v = torch.randn(8).expand(1, 6, 6, 8)
    choices = {"window_size": 3, "shift": shift}
    kept = random_layer(6, **choices).attend(q, k, v)
    torch.testing.assert_close(kept, v, atol=1e-13, rtol=0)
    ratio = random_layer(6, scores="sigmoid", **choices).attend(q, k, v) / v
    assert ratio.min() > 0
    assert ratio.max() < 1
    assert ratio.max() > 2 * ratio.min()


def test_width_first_is_not_height_first():
    layer = random_layer(6)
    q, k, v = torch.randn(3, 1, 6, 6, 8)
    y = layer.attend(q, k, v)
    turned = layer.attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert (y - turned).abs().max() > 1e-2


def one_token_map(gate):
    """A layer on single tokens without local context: X to Y of one head, 16 of 32 channels."""
    layer = random_layer(1, d_model=32, gate=gate)
    nn.init.zeros_(layer.lce.weight)
    nn.init.zeros_(layer.out.bias)
    with torch.no_grad():
        layer.out.weight[:, 16:] = 0
    x = torch.randn(2000, 1, 1, 32)
    return x.flatten(1), layer(x).flatten(1).detach()


def test_without_a_gate_a_head_is_a_linear_map_of_rank_d():
    for gate, linear in (("none", True), ("elementwise", False), ("head", False)):
        x, y = one_token_map(gate)
        inputs = torch.cat([x, torch.ones(len(x), 1)], 1)
        fit = torch.linalg.lstsq(inputs, y).solution
        r2 = 1 - (inputs @ fit - y).square().sum() / (y - y.mean(0)).square().sum()
        assert (r2 > 1 - 1e-12) if linear else (r2 < 0.95)
        assert torch.linalg.matrix_rank(y, rtol=1e-10) == 16  # W_O's rows, gate or not
        if linear:
            assert torch.linalg.matrix_rank(fit[:-1], rtol=1e-10) == 16


# ------------------------------------------------------- block and model


def tiny(**changes):
    sizes = {"widths": (8, 12, 16, 16), "depths": (2, 1, 1, 1), "n_heads": (2, 2, 4, 4)}
    others = {"window_size": 4, "projection": 20, "n_classes": 5, "image_size": 64}
    return GatedSwinRMT(GatedSwinRMTConfig(**(sizes | others | changes)))


def test_block_adds_position_mixer_and_ffn():
    block = Block(8, GatedRetention(8, 2, 4), hidden=20)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 4, 8)

    def conv(layer, z):
        y = F.conv2d(z.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1, groups=z.shape[3])
        return y.permute(0, 2, 3, 1)

    def norm(layer, z):
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return z * layer.weight + layer.bias

    y = x + conv(block.position, x)
    y = y + block.mixer(norm(block.norm1, y))
    hidden = F.gelu(block.ffn.up(norm(block.norm2, y)))
    y = y + block.ffn.down(hidden + conv(block.ffn.conv, hidden))
    torch.testing.assert_close(block(x), y, atol=1e-12, rtol=0)


def test_ffn_keeps_its_shape():
    assert FeedForward(6, 15)(torch.randn(2, 3, 3, 6)).shape == (2, 3, 3, 6)


@pytest.mark.parametrize("arm", CHOICES)
def test_stage_shapes_and_gradients(arm):
    model = tiny(drop_path=0.3, **CHOICES[arm])
    images = torch.randn(2, 3, 64, 64)
    shapes = [list(stage.shape) for stage in model.features(images)]
    assert shapes == [[2, 16, 16, 8], [2, 8, 8, 12], [2, 4, 4, 16], [2, 2, 2, 16]]
    assert [[b.mixer.shift for b in stage] for stage in model.stages] == [[0, 2], [0], [0], [0]]
    assert model.stages[3][0].drop_path.rate == pytest.approx(0.3)
    model.eval()(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_stem_of_stride_2_gives_maps_of_twice_the_side():
    model = tiny(stem_stride=2, image_size=32)
    assert [f.shape[1] for f in model.features(torch.randn(2, 3, 32, 32))] == [16, 8, 4, 2]


def test_initialisation():
    layer = GatedRetention(256, 4, 2, gate="elementwise", value_gate=True)
    for part in (*layer.qkv.weight.chunk(3), layer.value_gate.weight, layer.gate.weight):
        assert part.std().item() == pytest.approx(2**-2.5 / 16, rel=0.03)
    assert layer.out.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert not any(m.bias.any() for m in layer.modules() if isinstance(m, nn.Linear))
    model = tiny(widths=(64, 12, 16, 16))
    assert model.stages[0][0].mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_same_weights_without_windows_in_the_baseline():
    baseline = tiny(window_size=0, full_last=True)
    assert [[b.mixer.full for b in stage] for stage in baseline.stages] == [
        [False, False], [False], [False], [True],
    ]  # fmt: skip
    windows = tiny()
    assert baseline.state_dict().keys() == windows.state_dict().keys()


def test_bfloat16_stays_close():
    torch.set_default_dtype(torch.float32)
    model = tiny(scores="sigmoid", value_gate=True).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images).float()
    exact = model(images)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


# ------------------------------------------------------- counts


def on_meta(name, **changes):
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        return models.create(name, **changes).eval()


def macs(model):
    side = model.config.image_size
    return measure.flops(model, torch.empty(1, 3, side, side, device="meta")) // 2


# The card's count of RMT's own code has the biases of its 8 convolutions and one Linear before
# BatchNorms, which are redundant.
BIASES = 64 + 64 + 128 + 128 + 256 + 512 + 1024 + 1024
SIZES = {
    "rmt_78m": (78_347_940 - BIASES, 14_779_643_904),
    "gated_swinrmt_retention": (78_290_596, 14_516_972_544),
    "gated_swinrmt_swat": (78_290_596, 14_516_972_544),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_macs(name):
    model = on_meta(name)
    assert (measure.parameters(model), macs(model)) == SIZES[name]
    assert 77e6 < measure.parameters(model) < 79e6


def parameters_by_hand(c):
    """Added up layer by layer."""
    w, total = c.widths, 0
    for a, b, kernel in [
        (3, w[0] // 2, 9), (w[0] // 2, w[0] // 2, 9), (w[0] // 2, w[0], 9), (w[0], w[0], 9),
        *((w[i], w[i + 1], 9) for i in range(3)), (w[3], c.projection, 1),
    ]:  # fmt: skip
        total += a * b * kernel + 2 * b
    for width, depth, heads in zip(w, c.depths, c.n_heads, strict=True):
        hidden = round(c.ffn_ratio * width)
        mixer = 4 * (width**2 + width) + 26 * width + c.value_gate * (width**2 + width)
        mixer += {"none": 0, "elementwise": width, "head": heads}[c.gate] * (width + 1)
        ffn = 2 * width * hidden + hidden + width + 10 * hidden
        total += depth * (10 * width + 4 * width + mixer + ffn)
    return total + (c.projection + 1) * c.n_classes


def macs_by_hand(c):
    """Matrix products and convolutions."""
    w, side = c.widths, c.image_size
    total = (3 * w[0] // 2 + (w[0] // 2) ** 2) * 9 * (side // 2) ** 2
    total += (w[0] // 2 * w[0] + w[0] ** 2) * 9 * (side // 4) ** 2
    for stage, (width, depth, heads) in enumerate(zip(w, c.depths, c.n_heads, strict=True)):
        n = c.stage_side(stage)
        hidden, span = round(c.ffn_ratio * width), 2 * (min(c.window_size, n) or n)
        if c.full_last and stage == 3:
            span = n**2
        gates = {"none": 0, "elementwise": width, "head": heads}[c.gate] + c.value_gate * width
        token = (4 * width + gates) * width + 2 * span * width + 25 * width + 9 * width
        total += depth * n**2 * (token + 2 * width * hidden + 9 * hidden)
        total += 9 * width * w[stage + 1] * (n // 2) ** 2 if stage < 3 else 0
    n = c.stage_side(3)
    return total + w[3] * c.projection * n**2 + c.projection * c.n_classes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [{}, {"gate": "head"}, {"window_size": 56, "full_last": False}])
def test_counts_equal_the_formula(name, changes):
    if "full_last" not in changes:
        changes = changes | {"full_last": MODELS[name][1].full_last}
    model = on_meta(name, **changes)
    assert measure.parameters(model) == parameters_by_hand(model.config)
    assert macs(model) == macs_by_hand(model.config)


def test_what_gates_add_to_the_candidate():
    count = {gate: measure.parameters(on_meta("rmt_78m", gate=gate))
             for gate in ("none", "elementwise", "head")}  # fmt: skip
    assert count["elementwise"] - count["none"] == 6_991_616
    assert count["head"] - count["none"] == 218_488  # 0.22 M on the card


@pytest.mark.parametrize(("choices", "expected"), [({}, 5380), ({"gate": "elementwise"}, 6436)])
def test_the_mixer_of_the_small_experiment(choices, expected):
    layers = [nn.Linear(5, 32), GatedRetention(32, 2, 8, window_size=8, **choices)]
    assert measure.parameters(nn.Sequential(*layers, nn.Linear(32, 4))) == expected


# ------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 1)}, "lengths"),
        ({"stem_stride": 3}, "must be 2 or 4"),
        ({"full_last": True}, "full_last is for window_size=0"),
        ({"image_size": 42}, "no multiple of 4"),
        ({"image_size": 36}, "9x9 map of stage 1 can't be halved"),
        ({"window_size": 5}, "side 16 has no whole windows of side 5"),
        ({"n_heads": (3, 2, 4, 4)}, "n_heads=3 must divide d_model=8"),
        ({"scores": "relu"}, "unknown scores 'relu'.*softmax"),
        ({"window_size": -1}, "window_size is -1; it must be 0"),
        ({"gate": "elemntwise"}, "elementwise"),
        ({"decay_start": 0.0}, "must be positive"),
        ({"scores": "sigmoid", "n_heads": (1, 2, 4, 4)}, "even number of heads"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_the_configuration_alone_refuses_unknown_choices():
    same = dataclasses.asdict(MODELS["gated_swinrmt_retention"][1])
    for changes in ({"scores": "foo"}, {"gate": "foo"}, {"window_size": -1}):
        with pytest.raises(ValueError, match=r"foo|must be 0"):
            GatedSwinRMTConfig(**(same | changes))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("shape", [(1, 12, 12, 8), (1, 8, 4, 8), (8, 8, 8)])
def test_maps_of_another_size_are_refused(shape, shift):
    layer = GatedRetention(8, 2, 8, window_size=4, shift=shift)
    with pytest.raises(ValueError, match=r"expected \[B, 8, 8, C\]"):
        layer(torch.zeros(shape))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 32\]; expected \[B, 3, 64, 64\]"):
        tiny()(torch.zeros(1, 3, 32, 32))


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["rmt_78m"][1].window_size = 7
