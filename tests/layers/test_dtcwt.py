"""The dual-tree transform against loops over pixels, and what must hold exactly."""

import math

import numpy as np
import pytest
import torch

from gatebook.layers.dtcwt import ANGLES, DTCWT, FILTERS, filter_matrix, modulate


@pytest.fixture
def double():
    """New tensors and modules are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def filtered(signal, half):
    """A symmetric filter by loops; the signal goes on as its mirror image at both ends."""
    n = len(signal)
    mirrored = np.concatenate([signal, signal[::-1]] * 21)  # beyond any filter
    centre = 20 * n
    return np.array(
        [
            half[0] * mirrored[centre + i]
            + sum(
                tap * (mirrored[centre + i - k] + mirrored[centre + i + k])
                for k, tap in enumerate(half[1:], 1)
            )
            for i in range(n)
        ]
    )


def by_loops(image):
    """Low-pass map and the six complex bands of one image `[H, W]`, with near_sym_b."""
    h0, g0 = FILTERS["near_sym_b"]
    pair = {"l": h0, "h": [(-1) ** n * tap for n, tap in enumerate(g0)]}
    band = {}
    for row, along_width in pair.items():
        wide = np.array([filtered(line, along_width) for line in image])
        for column, along_height in pair.items():
            band[row + column] = np.array([filtered(line, along_height) for line in wide.T]).T
    complex_bands = {}
    for name, (first, second) in {"lh": (15, 165), "hh": (45, 135), "hl": (75, 105)}.items():
        y = band[name] / math.sqrt(2)
        z1 = np.zeros((image.shape[0] // 2, image.shape[1] // 2), complex)
        z2 = z1.copy()
        for i, j in np.ndindex(*z1.shape):
            a, b = y[2 * i, 2 * j], y[2 * i, 2 * j + 1]
            c, d = y[2 * i + 1, 2 * j], y[2 * i + 1, 2 * j + 1]
            z1[i, j], z2[i, j] = (a - d) + 1j * (b + c), (a + d) + 1j * (b - c)
        complex_bands[first], complex_bands[second] = z1, z2
    return band["ll"], np.array([complex_bands[angle] for angle in ANGLES])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (12, 8), (2, 22)])
def test_forward_equals_loops_over_pixels(double, height, width):
    x = torch.randn(2, 3, height, width)
    low, real, imaginary = DTCWT(height, width)(x)
    assert low.shape == x.shape
    assert real.shape == imaginary.shape == (2, 3, 6, height // 2, width // 2)
    for index in np.ndindex(2, 3):
        expected_low, expected = by_loops(x[index].numpy())
        np.testing.assert_allclose(low[index], expected_low, atol=1e-13)
        np.testing.assert_allclose(real[index], expected.real, atol=1e-13)
        np.testing.assert_allclose(imaginary[index], expected.imag, atol=1e-13)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 18), (56, 56)])
def test_inverse_reconstructs_in_float64(double, filters, height, width):
    x = torch.randn(2, 3, height, width)
    transform = DTCWT(height, width, filters)
    # near_sym_b's taps are known to 12 digits
    torch.testing.assert_close(transform.inverse(*transform(x)), x, atol=1e-11, rtol=0)


def test_inverse_reconstructs_in_float32():
    x = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    transform = DTCWT(56, 56)
    torch.testing.assert_close(transform.inverse(*transform(x)), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part", range(3))
def test_each_output_is_needed_to_reconstruct(double, part):
    x = torch.randn(1, 1, 8, 8)
    transform = DTCWT(8, 8)
    parts = list(transform(x))
    parts[part] = torch.zeros_like(parts[part])
    assert (transform.inverse(*parts) - x).abs().max() > 0.1


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_satisfy_the_reconstruction_identity(filters):
    """h0 * g0 + h1 * g1 is a unit impulse."""
    h0, g0 = (np.array([*reversed(half[1:]), *half]) for half in FILTERS[filters])
    h1, g1 = (
        np.array([*reversed(half[1:]), *half]) for half in map(modulate, reversed(FILTERS[filters]))
    )
    total = np.convolve(h0, g0) + np.convolve(h1, g1)
    impulse = np.zeros_like(total)
    impulse[len(total) // 2] = 1
    np.testing.assert_allclose(total, impulse, atol=3e-12)


def test_a_constant_has_no_high_bands(double):
    low, real, imaginary = DTCWT(16, 12)(torch.full((1, 1, 16, 12), 3.0))
    torch.testing.assert_close(low, torch.full_like(low, 3.0), atol=1e-11, rtol=0)
    assert real.abs().max() < 1e-11
    assert imaginary.abs().max() < 1e-11


def test_energies_of_white_noise_and_redundancy(double):
    """The shares follow from the filters: |h0|^4 for ll, the rest for the six bands."""
    torch.manual_seed(0)
    x = torch.randn(16, 1, 128, 128)  # large: mirrored borders add some energy
    low, real, imaginary = DTCWT(128, 128)(x)
    power = [half[0] ** 2 + 2 * sum(t**2 for t in half[1:]) for half in FILTERS["near_sym_b"]]
    assert low.square().sum() / x.square().sum() == pytest.approx(power[0] ** 2, rel=0.03)
    high = (real.square() + imaginary.square()).sum() / x.square().sum()
    assert high == pytest.approx(2 * power[0] * power[1] + power[1] ** 2, rel=0.03)
    assert low.numel() + real.numel() + imaginary.numel() == 4 * x.numel()


@pytest.mark.parametrize("place", range(6))
def test_stripes_excite_most_the_band_of_their_angle(place):
    across = math.radians(ANGLES[place] + 90)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    stripes = torch.cos(2.3 * (x * math.cos(across) - y * math.sin(across)))
    _, real, imaginary = DTCWT(48, 48)(stripes[None, None])
    energy = (real.square() + imaginary.square()).sum((0, 1, 3, 4))
    assert energy.argmax() == place
    assert energy[place] > 2 * energy[5 - place]  # tells an angle from its mirror image


def test_filter_matrix_mirrors_the_ends():
    matrix = filter_matrix([2.0, 1.0], 3)
    assert torch.equal(matrix, torch.tensor([[3.0, 1, 0], [1, 2, 1], [0, 1, 3]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 4), "5x4 has an odd side"), ((4, 4, "haar"), "near_sym_b")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DTCWT(*arguments)


def test_low_pass_is_the_inverse_of_the_low_pass_map_alone():
    transform = DTCWT(6, 8).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    low, real, imaginary = transform(x)
    expected = transform.inverse(low, torch.zeros_like(real), torch.zeros_like(imaginary))
    torch.testing.assert_close(transform.low_pass(x), expected)


def test_maps_of_another_size_are_refused():
    transform = DTCWT(6, 8)
    for call in (transform, transform.low_pass):
        with pytest.raises(ValueError, match="a map of 8x6; this layer takes 6x8 only"):
            call(torch.zeros(1, 1, 8, 6))
