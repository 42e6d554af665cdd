"""Images: the generated task, CIFAR-10 and ImageNet-1K from mirrors of a few rows, augmentation."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from gatebook.data import augment, images, sources
from gatebook.models.swin import SwinConfig, SwinTransformer
from gatebook.training import Recipe, fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_straddle_xor_is_the_xor_of_the_marked_bits():
    x, label = images.straddle_xor(500, generator())
    assert x.shape == (500, 3, 4, 4)
    for image, answer in zip(x, label, strict=True):
        (y0, x0), (y1, x1) = image[0].nonzero().tolist()
        assert {1, 2} in ({y0, y1}, {x0, x1})
        assert abs(y0 - y1) + abs(x0 - x1) == 1
        product = image[1, y0, x0] * image[1, y1, x1]
        assert product == (1 if answer == 0 else -1)


def test_straddle_xor_is_balanced_and_a_half_says_nothing():
    x, label = images.straddle_xor(20_000, generator(1))
    top = x[:, 1, :2].sum(dim=(1, 2))  # a lone bit when the pair straddles the rows
    assert label.float().mean().item() == pytest.approx(0.5, abs=0.02)
    for bit in (-1, 1):
        assert label[top == bit].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert x[:, 2].std().item() == pytest.approx(0.5, abs=0.01)


def test_straddle_xor_depends_on_its_generator_alone():
    torch.manual_seed(1)
    one = images.straddle_xor(8, generator(3))
    torch.manual_seed(2)
    two = images.straddle_xor(8, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_mirror(folder, name, split, column, n, side):
    import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    rows = {column: [encode(p) for p in pixels], "label": [i % 10 for i in range(n)]}
    (folder / name).mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / name / f"{split}.parquet"))
    return pixels


def test_cifar10_reads_a_mirror_pixel_for_pixel(tmp_path):
    pixels = write_mirror(tmp_path, "cifar10", "test", "img", 12, 32)
    data = images.cifar10("test", tmp_path)
    assert len(data) == 12
    assert torch.equal(data.pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [*range(10), 0, 1]


def test_cifar10_without_data_names_the_ways_to_get_it(tmp_path):
    with pytest.raises(sources.DataUnavailableError, match="cifar10: 144 MB"):
        images.cifar10("train", tmp_path)


def test_an_epoch_shows_each_image_once():
    pixels = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 32, 32)
    data = images.Cifar(pixels, torch.arange(20))
    batches = images.CifarBatches(data, 5, seed=0, padding=0)
    assert len(batches) == 4
    epochs = [list(batches) for _ in range(2)]
    orders = [torch.cat([labels for _, labels in epoch]).tolist() for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(20))] * 2
    assert orders[0] != orders[1]
    for x, labels in epochs[0]:
        expected = images.normalise(pixels[labels], images.CIFAR10_MEAN, images.CIFAR10_STD)
        torch.testing.assert_close(x, expected)


def test_batches_in_order_hold_every_image():
    data = images.Cifar(torch.zeros(7, 3, 8, 8, dtype=torch.uint8), torch.arange(7))
    batches = data.in_order(3)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)
    assert [len(x) for x, _ in batches] == [3, 3, 1]


def test_the_generator_of_the_batches_can_be_saved_and_restored():
    data = images.Cifar(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), torch.arange(20))
    batches = images.CifarBatches(data, 5, seed=0)
    state = batches.state_dict()
    first = [labels for _, labels in batches]
    batches.load_state_dict(state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, batches, strict=True))


def test_mixed_batches_have_probabilities_and_can_be_saved_and_restored():
    pixels = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator())
    data = images.Cifar(pixels, torch.arange(20), n_classes=20)
    batches = images.CifarBatches(data, 5, seed=0, mixing=augment.Mixing(erase=0))
    next(iter(batches))
    state = batches.state_dict()
    first = list(batches)
    assert all(targets.shape == (5, 20) for _, targets in first)
    assert any((targets > 0.05).sum() > 5 for _, targets in first)  # of two classes
    torch.testing.assert_close(first[0][1].sum(1), torch.ones(5))
    batches.load_state_dict(state)
    for one, two in zip(first, batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_cifar100_has_fine_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"img": [encode(np.zeros((32, 32, 3), np.uint8))] * 3, "fine_label": [99, 0, 7]}
    (tmp_path / "cifar100").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "cifar100" / "train.parquet"))
    data = images.cifar10("train", tmp_path, corpus="cifar100")
    assert (data.labels.tolist(), data.n_classes) == ([99, 0, 7], 100)
    with pytest.raises(ValueError, match="cifar100"):
        images.cifar10("train", tmp_path, corpus="cifar")


def test_too_few_images_for_a_batch_are_refused():
    data = images.Cifar(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    with pytest.raises(ValueError, match="3 images are fewer than a batch of 4"):
        images.CifarBatches(data, 4, seed=0)


def test_normalised_images_have_the_channel_means_at_zero():
    pixels = torch.tensor([123, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    x = images.normalise(pixels, images.IMAGENET_MEAN, images.IMAGENET_STD)
    assert x.abs().max() < 0.02


def test_crop_flip_is_a_window_of_the_padded_image_or_of_its_mirror():
    pixels = torch.randint(1, 256, (64, 3, 6, 5), generator=generator(), dtype=torch.uint8)
    result = augment.crop_flip(pixels, 2, generator(1))
    flips = 0
    for before, after in zip(pixels, result, strict=True):
        padded = F.pad(before, (2, 2, 2, 2))
        plain = [padded[:, y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
        straight = any(torch.equal(after, crop) for crop in plain)
        mirrored = any(torch.equal(after, crop.flip(-1)) for crop in plain)
        assert straight or mirrored
        flips += mirrored
    assert 16 < flips < 48


def test_mixup_is_a_convex_combination_with_matching_targets():
    x = torch.randn(6, 3, 8, 8, generator=generator())
    labels = torch.arange(6)
    seen = set()
    for seed in range(20):
        mixed, targets = augment.Mixing(erase=0)(x, labels, 10, generator(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        weight = (targets[0, 0] - 0.01) / 0.9
        torch.testing.assert_close(targets[0, 5], 0.9 * (1 - weight) + 0.01)
        from_own = torch.isclose(mixed, x)
        from_other = torch.isclose(mixed, x.flip(0))
        if (from_own | from_other).all():
            seen.add("cutmix")
            torch.testing.assert_close(from_own[0].float().mean(), weight)
        else:
            seen.add("mixup")
            torch.testing.assert_close(mixed, weight * x + (1 - weight) * x.flip(0))
    assert seen == {"mixup", "cutmix"}


@pytest.mark.parametrize("kept", ["mixup", "cutmix"])
def test_one_kind_of_mixing_alone(kept):
    x, labels = torch.randn(6, 3, 8, 8, generator=generator()), torch.arange(6)
    mixing = augment.Mixing(**{"mixup": 0.0, "cutmix": 0.0, "erase": 0.0, kept: 1.0})
    for seed in range(20):
        mixed, _ = mixing(x, labels, 6, generator(seed))
        whole = (torch.isclose(mixed, x) | torch.isclose(mixed, x.flip(0))).all()
        assert whole == (kept == "cutmix")


def test_without_mixing_targets_are_smoothed_labels():
    x, labels = torch.randn(4, 3, 8, 8, generator=generator()), torch.tensor([2, 0, 1, 1])
    mixing = augment.Mixing(mixup=0, cutmix=0, erase=0, smoothing=0.3)
    mixed, targets = mixing(x, labels, 3, generator())
    assert torch.equal(mixed, x)
    torch.testing.assert_close(targets, 0.7 * F.one_hot(labels).float() + 0.1)


def test_mixing_erases_first():
    mixing = augment.Mixing(mixup=0, cutmix=0, erase=1.0)
    x, labels = torch.zeros(50, 3, 16, 16), torch.zeros(50, dtype=torch.long)
    mixed, _ = mixing(x, labels, 2, generator())
    assert mixed.flatten(1).any(1).all()


@pytest.mark.parametrize("options", [{"mixup": -0.1}, {"smoothing": 1.0}, {"erase": 1.5}])
def test_what_cannot_be_mixed_is_refused(options):
    with pytest.raises(ValueError, match="got"):
        augment.Mixing(**options)


def test_random_erasing_touches_boxes_in_a_quarter_of_the_images():
    x = torch.zeros(400, 3, 32, 32)
    erased = augment.random_erase(x, generator())
    assert not x.any()
    touched = erased.abs().sum(dim=1) > 0  # [B, H, W]
    hit = touched.flatten(1).any(1)
    assert 0.19 < hit.float().mean() < 0.31
    for image in touched[hit]:
        box = image.any(1).sum() * image.any(0).sum()
        assert image.sum() == box
        assert 0.015 < box / 32**2 < 0.35


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_of_randaugment_change_a_picture_but_not_its_size(name):
    pixels = np.random.default_rng(0).integers(30, 200, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    result = augment.OPERATIONS[name](image, 0.9, 1)
    assert (result.size, result.mode) == (image.size, "RGB")
    assert not np.array_equal(np.asarray(result), pixels)


def test_randaugment_of_strength_zero_keeps_geometry():
    image = Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8))
    for name in ("rotate", "shear x", "shear y", "translate x", "translate y", "brightness"):
        assert np.array_equal(np.asarray(augment.OPERATIONS[name](image, 0.0, 1)), image)


def test_random_boxes_stay_inside_and_keep_their_range():
    rng = random.Random(0)
    for width, height in ((40, 30), (500, 20), (8, 300)):
        for _ in range(100):
            left, top, right, bottom = augment.random_box(width, height, rng)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_test_transform_takes_the_centre():
    pixels = np.zeros((256, 320, 3), dtype=np.uint8)
    pixels[16:240, 48:272] = 255
    assert augment.TestTransform(224)(Image.fromarray(pixels)).min() == 255


def seeded(stream):
    """Images and targets of three batches; the noise of erasing is torch's own."""
    for step in range(3):
        torch.manual_seed(step)
        yield from next(stream)


def test_imagenet_pipeline_trains_a_small_swin_on_a_mirror(tmp_path):
    """The whole path of the full preset, with the schema of ILSVRC/imagenet-1k and 24 images."""
    write_mirror(tmp_path, "imagenet-1k", "train", "image", 24, 40)
    write_mirror(tmp_path, "imagenet-1k", "validation", "image", 6, 40)
    options = {"image_size": 32, "seed": 0, "workers": 0, "data_dir": tmp_path, "n_classes": 10}
    batches = images.ImageNetBatches(8, **options)
    torch.manual_seed(0)
    config = SwinConfig(
        d_model=8, depths=(2, 2), n_heads=(2, 4), window_size=2, image_size=32, n_classes=10
    )
    model = SwinTransformer(config)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    recipe = Recipe(steps=4, lr=1e-3, weight_decay=0.05, clip_norm=5.0)
    history = fit(model, batches, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), recipe)
    assert len(history.loss) == 4
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))
    resumed, whole = (images.ImageNetBatches(8, **options) for _ in range(2))
    resumed.load_state_dict(batches.state_dict())  # after the four steps of `fit`
    stream = iter(whole)
    for _ in range(4):
        next(stream)
    for one, two in zip(seeded(iter(resumed)), seeded(stream), strict=True):
        assert torch.equal(one, two)
    (x, labels), *rest = images.imagenet_validation(8, 32, workers=0, data_dir=tmp_path)
    assert (x.shape, labels.tolist(), rest) == ((6, 3, 32, 32), [0, 1, 2, 3, 4, 5], [])
    write_mirror(tmp_path, "mini-imagenet", "test", "image", 3, 40)
    options = {"workers": 0, "data_dir": tmp_path, "corpus": "mini-imagenet", "split": "test"}
    tested = images.imagenet_validation(8, 32, **options)
    assert [labels.tolist() for _, labels in tested] == [[0, 1, 2]]
