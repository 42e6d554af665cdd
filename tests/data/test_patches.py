"""Pictures made of patches: their labels, their mirrored pairs, and shuffled patches."""

import pytest
import torch
from torch.nn import functional as F

from gatebook.data import patches


def generator():
    return torch.Generator().manual_seed(3)


def kinds_of(images):
    """The template of each place, `[n, 3, 3]`, read off noiseless pictures."""
    cut = F.unfold(images, 4, stride=4).mT  # [n, 9, 16]
    nearest = (cut[:, :, None] - patches.templates().flatten(1)).abs().sum(-1)
    assert (nearest.amin(-1) < 1e-5).all()
    return nearest.argmin(-1).view(-1, 3, 3)


def test_labels_are_what_the_picture_shows():
    images, labels = patches.what_and_where(400, generator(), noise=0)
    for kinds, label in zip(kinds_of(images), labels, strict=True):
        what = int(torch.isin(kinds, torch.tensor([2, 3])).sum() > 3)
        (_, left), (_, right) = ((kinds == k).nonzero()[0].tolist() for k in (0, 1))
        assert left != right
        assert [(kinds == k).sum() for k in (0, 1)] == [1, 1]
        assert label == 2 * what + (left < right)
    assert (torch.bincount(labels, minlength=4) > 70).all()


def test_noise_has_the_given_deviation():
    clean, _ = patches.what_and_where(500, generator(), noise=0)
    noisy, _ = patches.what_and_where(500, generator(), noise=0.5)
    assert (noisy - clean).std() == pytest.approx(0.5, rel=0.02)


def test_mirrored_pairs_hold_the_same_patches_and_opposite_labels():
    images, labels = patches.what_and_where(100, generator(), mirrored=True)
    first, second = F.unfold(images, 4, stride=4).mT.split(50)
    columns = torch.arange(9).view(3, 3).flip(1).flatten()
    assert torch.equal(first, second[:, columns])
    assert torch.equal(labels[:50] // 2, labels[50:] // 2)
    assert torch.equal(labels[:50] % 2, 1 - labels[50:] % 2)


def test_an_odd_number_of_mirrored_pictures_is_refused():
    with pytest.raises(ValueError, match="n=7 is odd"):
        patches.what_and_where(7, generator(), mirrored=True)


def test_digits_are_all_there_once():
    x, y, held_x, held_y = patches.digits(generator(), train=1000)
    assert (x.shape, held_x.shape) == ((1000, 1, 8, 8), (797, 1, 8, 8))
    assert (x.min(), x.max()) == (-1, 1)
    assert len(torch.cat([x, held_x]).flatten(1).unique(dim=0)) == 1797
    assert torch.bincount(torch.cat([y, held_y])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_shuffling_moves_whole_patches():
    images = torch.arange(2 * 3 * 6 * 4.0).view(2, 3, 6, 4)
    moved = patches.shuffle_patches(images, 2, generator())
    assert moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        cut = [F.unfold(x[None], 2, stride=2)[0].mT.tolist() for x in (before, after)]
        assert cut[0] != cut[1]
        assert sorted(cut[0]) == sorted(cut[1])


def test_each_picture_is_shuffled_in_its_own_order():
    images = torch.randn(1, 1, 8, 8).repeat(5, 1, 1, 1)
    assert len(patches.shuffle_patches(images, 2, generator()).flatten(1).unique(dim=0)) == 5


def test_shuffling_needs_whole_patches():
    with pytest.raises(ValueError, match="6x4 pixels have no whole patches of side 4"):
        patches.shuffle_patches(torch.zeros(1, 1, 6, 4), 4, generator())
