"""Windows, patches and stochastic depth."""

import pytest
import torch

from gatebook.layers.vision import DropPath, PatchEmbed, merge_windows, partition_windows


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
