"""SVT: mixers against loops with complex numbers, and the released code's exact counts."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure
from gatebook.data.gratings import ANGLES, gratings
from gatebook.layers.dtcwt import DTCWT
from gatebook.layers.spectral import FourierGate, PoolMixer, WaveletGate, haar, inverse_haar
from gatebook.models import create
from gatebook.models.svt import (
    MODELS,
    SPECTRAL_MIXERS,
    ChannelBlend,
    ClassBlock,
    LowBlend,
    MapAttention,
    RowBlend,
    ScatterMixer,
    SplitMixer,
    TensorBlend,
)


@pytest.fixture
def double():
    """New tensors and modules are float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module):
    """Every parameter from N(0, 0.5^2), so that none is negligible."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def as_complex(parameter):
    """Real and imaginary part `[2, ...]` as one NumPy array."""
    real, imaginary = parameter.detach().numpy()
    return real + 1j * imaginary


def split_relu(z):
    """ReLU on both parts."""
    return np.maximum(z.real, 0) + 1j * np.maximum(z.imag, 0)


def einstein_by_loops(blend, blocks):
    """EBM of `[n, d]` complex numbers, one block at a time."""
    (w1, w2), (b1, b2) = map(as_complex, blend.weights), map(as_complex, blend.biases)
    out = []
    for x, *layer in zip(blocks, w1, b1, w2, b2, strict=True):
        out.append(split_relu(x @ layer[0] + layer[1]) @ layer[2] + layer[3])
    return np.array(out)


def bands(*shape):
    return torch.randn(shape), torch.randn(shape)


def test_channel_blend_equals_complex_loops(double):
    blend = randomise(ChannelBlend(12))
    real, imaginary = bands(2, 12, 6, 2, 3)
    x = real.numpy() + 1j * imaginary.numpy()
    y = torch.complex(*blend(real, imaginary)).detach().numpy()
    for b, o, i, j in np.ndindex(2, 6, 2, 3):
        expected = einstein_by_loops(blend, x[b, :, o, i, j].reshape(4, 3)).reshape(12)
        np.testing.assert_allclose(y[b, :, o, i, j], expected, atol=1e-13)


def test_row_blend_equals_complex_loops(double):
    blend = randomise(RowBlend(3, 5))
    real, imaginary = bands(2, 4, 6, 3, 5)
    x = real.numpy() + 1j * imaginary.numpy()
    y = torch.complex(*blend(real, imaginary)).detach().numpy()
    for b, c, o in np.ndindex(2, 4, 6):
        np.testing.assert_allclose(y[b, c, o], einstein_by_loops(blend, x[b, c, o]), atol=1e-13)


def test_tensor_blend_is_a_complex_product(double):
    blend = randomise(TensorBlend(4, 6, 8))
    real, imaginary = bands(2, 4, 6, 3, 4)
    expected = (real.numpy() + 1j * imaginary.numpy()) * as_complex(blend.weight)
    y = torch.complex(*blend(real, imaginary)).detach().numpy()
    np.testing.assert_allclose(y, expected, atol=1e-13)


def test_low_blend_equals_loops_over_channels_then_rows(double):
    blend = randomise(LowBlend(8, 4, 6))
    x = torch.randn(2, 8, 4, 6)
    weights, biases = ([p.detach().numpy() for p in ps] for ps in (blend.weights, blend.biases))

    def mlp(which, block, vector):
        (first, second), (b1, b2) = weights[which][:, block], biases[which][:, block, :, 0]
        return np.maximum(vector @ first + b1, 0) @ second + b2

    y = x.numpy().copy()
    for b, i, j, block in np.ndindex(2, 4, 6, 4):
        part = slice(2 * block, 2 * block + 2)
        y[b, part, i, j] = mlp(0, block, y[b, part, i, j])
    for b, c, i in np.ndindex(2, 8, 4):
        y[b, c, i] = mlp(1, i, y[b, c, i])
    np.testing.assert_allclose(blend(x).detach().numpy(), y, atol=1e-12)


def mix_by_parts(mixer, x, blends):
    """Low-pass factor, blends one after the other, inverse; channels-last as the mixer is."""
    height, width = x.shape[1:3]
    transform = DTCWT(height, width)
    low, *parts = transform(x.permute(0, 3, 1, 2))
    for blend in blends:
        parts = blend(*parts)
    mixed = transform.inverse(low * mixer.low, *parts)
    return mixed.permute(0, 2, 3, 1)


def test_scatter_mixer_is_transform_blend_and_inverse(double):
    x = torch.randn(2, 6, 8, 4)
    for kind in ("ttxe", "tttt"):
        mixer = randomise(SPECTRAL_MIXERS[kind](4, 6, 8))
        torch.testing.assert_close(mixer(x), mix_by_parts(mixer, x, mixer.high))


def test_mixer_without_blending_is_the_identity(double):
    mixer = ScatterMixer(3, 6, 8)
    nn.init.ones_(mixer.low)
    x = torch.randn(2, 6, 8, 3)
    torch.testing.assert_close(mixer(x), x, atol=1e-11, rtol=0)


def test_split_mixer_interleaves_convolution_and_scattering(double):
    mixer = randomise(SplitMixer(8, 6, 10))
    x = torch.randn(2, 6, 10, 8)
    y = mixer(x)
    weight, bias = mixer.conv.weight, mixer.conv.bias
    near = F.conv2d(x[..., :4].permute(0, 3, 1, 2), weight, bias, padding=1, groups=4)
    torch.testing.assert_close(y[..., ::2], near.permute(0, 2, 3, 1))
    channels, rows = mixer.scatter.high
    assert (type(channels), type(rows)) == (ChannelBlend, RowBlend)
    assert isinstance(SPECTRAL_MIXERS["eeee"](8, 6, 10).scatter.low, LowBlend)
    far = mix_by_parts(mixer.scatter, x[..., 4:], (channels, rows))
    torch.testing.assert_close(y[..., 1::2], far)


def test_transform_stays_float32_under_autocast():
    mixer = SPECTRAL_MIXERS["ttxe"](8, 8, 8)
    x = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(x)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, mixer(x))
    assert mixer(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["ttee", "ttxe", "tttt", "eeee", "fourier", "wavelet", "pool"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_refused(kind, dtype):
    mixer = SPECTRAL_MIXERS[kind](8, 8, 8).to(dtype)
    with pytest.raises(TypeError, match=f"weights are {dtype}: keep the model in float32"):
        mixer(torch.randn(1, 8, 8, 8, dtype=dtype))


@pytest.mark.parametrize("kind", ["ttee", "ttxe", "tttt", "eeee", "fourier", "wavelet"])
def test_maps_of_another_size_are_refused(kind):
    mixer = SPECTRAL_MIXERS[kind](8, 8, 12)
    with pytest.raises(ValueError, match="a map of 12x8; this layer takes 8x12 only"):
        mixer(torch.randn(1, 12, 8, 8))


def test_haar_is_orthogonal_and_averages(double):
    x = torch.randn(2, 4, 6, 3)
    split = haar(x)
    assert split.shape == (2, 4, 2, 3, 3)
    torch.testing.assert_close(inverse_haar(split), x)
    torch.testing.assert_close(split.square().sum(), x.square().sum())
    a, b, c, d = x[0, 0, 0], x[0, 0, 1], x[0, 1, 0], x[0, 1, 1]
    expected = torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2
    torch.testing.assert_close(split[0, :, 0, 0], expected)


def test_wavelet_gate_of_ones_is_the_identity(double):
    gate = WaveletGate(3, 4, 6)
    nn.init.ones_(gate.gate)
    x = torch.randn(2, 4, 6, 3)
    torch.testing.assert_close(gate(x), x)


def test_fourier_gate_is_a_circular_convolution(double):
    """The kernel is the gate's inverse transform; oracle: sums over shifted maps."""
    gate = FourierGate(2, 4, 6)
    kernel = torch.randn(4, 6, 2)
    gate.gate.data = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    x = torch.randn(1, 4, 6, 2)
    expected = sum(kernel[i, j] * x.roll((i, j), (1, 2)) for i, j in np.ndindex(4, 6))
    torch.testing.assert_close(gate(x), expected)


def test_pool_mixer_is_blind_to_differences_inside_a_square(double):
    mixer = PoolMixer(3, 3)
    x = torch.randn(2, 4, 6, 3)
    bands_of = haar(x)
    bands_of[:, 1:] = 0  # keep the means alone
    torch.testing.assert_close(mixer(x), mixer(inverse_haar(bands_of)))
    means = x.unflatten(2, (3, 2)).unflatten(1, (2, 2)).mean((2, 4)).permute(0, 3, 1, 2)
    near = F.conv2d(means, mixer.conv.weight, mixer.conv.bias, padding=1, groups=3)[..., 1, 2]
    torch.testing.assert_close(mixer(x)[:, 3, 5], mixer.mlp(near))


# Released code, counted: with and without the second head, one scattering stage of channel mixing.
def test_parameters_of_the_released_code():
    assert count(mixer="ttxe", scatter_stages=1) == 22_052_592
    assert count(mixer="ttxe", scatter_stages=1, token_labels=False) == 21_603_592
    assert count(mixer="ttee", scatter_stages=1) == 22_015_728
    with torch.device("meta"):
        assert measure.parameters(SPECTRAL_MIXERS["ttxe"](64, 56, 56)) == 205_056


def count(name="svt_h_s", **changes):
    with torch.device("meta"):
        return measure.parameters(create(name, **changes))


def linear(c_in, c_out):
    return c_in * c_out + c_out


def mixer_by_hand(kind, c, side):
    """Parameters of one scattering mixer on a map of `side` x `side`."""
    half = side // 2
    if kind in ("ttee", "eeee"):
        c //= 2
        conv, rows = 10 * c, 4 * half * (half**2 + half)
        total = conv + rows + mixer_by_hand("ttxe", c, side)
        if kind == "eeee":  # real layers over channels and rows in place of the tensor
            total += 2 * 4 * ((c // 4) ** 2 + c // 4) + 2 * side * (side**2 + side) - c * side**2
        return total
    low = c * side**2
    if kind == "ttxe":
        return low + 4 * 4 * ((c // 4) ** 2 + c // 4)
    return low + 2 * c * 6 * half**2


def parameters_by_hand(config):
    """Parameters of a configuration, added up layer by layer."""
    s, before = config.stem, config.stem
    total = 49 * 3 * s + 2 * 9 * s * s + 3 * 2 * s
    for stage, (c, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        hidden, side = config.ratios[stage] * c, 224 // (4 * 2**stage)
        scatter = stage < config.scatter_stages
        mixer = mixer_by_hand(config.mixer, c, side) if scatter else 4 * linear(c, c)
        ffn = linear(c, hidden) + 10 * hidden + linear(hidden, c)
        total += linear(9 * before, c) + 2 * c + depth * (mixer + ffn + 4 * c) + 2 * c
        before = c
    total += 4 * linear(c, c) + linear(c, 4 * c) + linear(4 * c, c) + 4 * c
    return total + (1 + config.token_labels) * linear(c, 1000)


@pytest.mark.parametrize("kind", ["ttee", "ttxe", "tttt", "eeee"])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_formula(name, kind):
    config = dataclasses.replace(MODELS[name][1], mixer=kind)
    assert count(name, mixer=kind) == parameters_by_hand(config)


def test_configurations_of_the_paper():
    small, large = MODELS["svt_h_s"][1], MODELS["svt_h_l"][1]
    assert (small.n_heads, large.n_heads) == ((2, 4, 10, 14), (3, 6, 12, 16))
    assert (small.depths, large.depths) == ((3, 4, 6, 3), (3, 6, 18, 3))
    assert MODELS["svt_h_b"][1].n_heads == (2, 4, 10, 16)
    with torch.device("meta"):
        model = create("svt_h_s")
    for stage, kind in enumerate((SplitMixer, SplitMixer, MapAttention, MapAttention)):
        assert all(type(block.mixer) is kind for block in model.stages[stage])
    assert model.stages[3][2].drop_path.rate == pytest.approx(0.1)
    assert model.stages[0][0].drop_path.rate == 0


def test_class_block_equals_torchs_attention(double):
    block = randomise(ClassBlock(8, 2))
    x = torch.randn(3, 5, 8)
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    state = {
        "in_proj_weight": torch.cat([block.q.weight, block.kv.weight]),
        "in_proj_bias": torch.cat([block.q.bias, block.kv.bias]),
        "out_proj.weight": block.out.weight,
        "out_proj.bias": block.out.bias,
    }
    reference.load_state_dict(state)
    y = block.norm1(x)
    token = x[:, 0] + reference(y[:, :1], y, y, need_weights=False)[0][:, 0]
    torch.testing.assert_close(block(x), token + block.mlp(block.norm2(token)))


TINY = {
    "stem": 4, "widths": (8, 16), "depths": (1, 2), "n_heads": (2, 2), "ratios": (2, 2),
    "scatter_stages": 1, "image_size": 16, "stride": 2, "n_classes": 5, "token_labels": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECTRAL_MIXERS)
def test_shapes_and_gradients(kind):
    torch.manual_seed(0)
    model = create("svt_h_s", **(TINY | {"mixer": kind, "token_labels": kind == "ttee"}))
    images = torch.randn(3, 3, 16, 16)
    assert [list(m.shape) for m in model.features(images)] == [[3, 8, 8, 8], [3, 4, 4, 16]]
    logits, tokens = model.scores(images)
    assert logits.shape == (3, 5)
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 2]))
    if kind == "ttee":
        assert tokens.shape == (3, 16, 5)
        loss = loss + tokens.logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_published_stride_is_four():
    model = create("svt_h_s", **(TINY | {"stride": 4, "image_size": 32, "mixer": "ttxe"}))
    assert model.features(torch.randn(2, 3, 32, 32))[0].shape == (2, 8, 8, 8)


def test_token_head_adds_half_of_the_highest_score():
    torch.manual_seed(0)
    model = create("svt_h_s", **(TINY | {"token_labels": True})).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        both = model(images)
        tokens = model.norms[-1](model.features(images)[-1].flatten(1, 2))
        highest = model.token_head(tokens).max(1).values
        model.token_head = None
        torch.testing.assert_close(both, model(images) + 0.5 * highest)


def test_training_leaves_the_token_head_to_token_labels():
    torch.manual_seed(0)
    model, images = create("svt_h_s", **(TINY | {"token_labels": True})), torch.randn(2, 3, 16, 16)
    logits, tokens = model(images), model.scores(images)[1]
    model.token_head = None
    torch.testing.assert_close(logits, model(images))
    assert tokens.shape == (2, 16, 5)


def test_initialisation():
    torch.manual_seed(0)
    model = create("svt_h_s", depths=(1, 1, 1, 1), mixer="ttxe")
    mixer = model.stages[0][0].mixer
    assert mixer.low.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.high[0].weights[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.high[0].biases[1].any()
    assert model.stages[2][0].ffn.enter.weight.std().item() == pytest.approx(0.02, rel=0.02)
    fan_out = 9 * 320
    assert model.enter[2].conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert model.stages[2][0].ffn.conv.weight.std().item() == pytest.approx(
        (2 / 9) ** 0.5, rel=0.05
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "dct"}, "ttee"),
        ({"depths": (1,)}, "one entry a stage"),
        ({"stride": 3}, "must be 2 or 4"),
        ({"scatter_stages": -1}, "scatter_stages=-1 must be 0 to 2"),
        ({"scatter_stages": 3}, "scatter_stages=3 must be 0 to 2"),
        ({"widths": (12, 16), "n_heads": (2, 2)}, "d_model=12 must be a multiple of 8"),
        ({"widths": (9, 16)}, "d_model=9 must be a multiple of 8"),
        ({"image_size": 18}, "image_size 18 is not a multiple of 4"),
        ({"widths": (6, 16), "mixer": "ttxe"}, "6 channels do not form four blocks"),
        ({"image_size": 20, "scatter_stages": 2}, "5x5 has an odd side"),
        ({"n_heads": (2, 3)}, "must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        create("svt_h_s", **(TINY | changes))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 32\]; expected"):
        create("svt_h_s", **TINY)(torch.zeros(1, 3, 32, 32))


class TestGratings:
    """The generated task."""

    @pytest.mark.parametrize("angles", [ANGLES, (0, 40, 90)])
    def test_stripes_have_their_angle_and_period(self, angles):
        draw = torch.Generator().manual_seed(0)
        images, labels = gratings(400, draw, side=48, amplitude=2.0, period=4.0, angles=angles)
        assert images.shape == (400, 1, 48, 48)
        power = torch.fft.fft2(images[:, 0]).abs().square()
        rows, columns = torch.fft.fftfreq(48), torch.fft.fftfreq(48)
        power[:, rows.abs()[:, None].maximum(columns.abs()) < 0.1] = 0  # the clutter
        for place, angle in enumerate(angles):
            peak = power[labels == place].mean(0).argmax()
            fy, fx = rows[peak // 48].item(), columns[peak % 48].item()
            assert np.hypot(fy, fx) == pytest.approx(1 / 4, abs=1 / 48)
            normal = np.degrees(np.arctan2(-fy, fx)) - 90  # rows go down
            assert (normal - angle + 90) % 180 - 90 == pytest.approx(0, abs=5)

    def test_clutter_has_deviation_one_and_classes_are_even(self):
        draw = torch.Generator().manual_seed(0)
        images, labels = gratings(3000, draw, side=16, amplitude=0.0)
        assert images.std().item() == pytest.approx(1, abs=0.03)
        assert torch.bincount(labels, minlength=6).min() > 400

    def test_a_seed_fixes_the_images(self):
        first, second = (gratings(4, torch.Generator().manual_seed(3))[0] for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, gratings(4, torch.Generator().manual_seed(4))[0])
