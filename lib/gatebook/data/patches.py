"""Pictures made of patches, for models that may or may not see where a patch is.

Images are `[n, c, H, W]` float32, labels `[n]` int64.
"""

import numpy as np
import torch
from torch import Tensor

SIDE, PATCH, TEMPLATES = 3, 4, 6  # patches a side, pixels a side of a patch, kinds of patches


def what_and_where(
    n: int, generator: torch.Generator, *, noise: float = 0.5, mirrored: bool = False
) -> tuple[Tensor, Tensor]:
    """Pictures of 3 x 3 patches with two labels: which patches there are, and in which order.

    Six fixed templates of 4 x 4 pixels, drawn once from N(0, 1). Templates 0 and 1 appear once
    each, in different columns; each of the other seven places holds one of 2, 3, 4, 5. Then noise.

        what   1 if templates 2 and 3 together are more frequent than 4 and 5
        where  1 if template 0 is left of template 1

    The multiset of patches says nothing about `where`: reversing the columns of a picture keeps it
    and changes the label. A model that reads the multiset alone is right on exactly one picture of
    each such pair, and its mean cross-entropy on pairs is at least ln 2 (Jensen).

    Args:
        n: Number of pictures.
        generator: Source of every random number but the templates.
        noise: Standard deviation of what is added to each pixel.
        mirrored: The second half repeats the first with reversed columns of patches.

    Returns:
        Images `[n, 1, 12, 12]` and labels `[n]`, 2 what + where.

    Raises:
        ValueError: Mirrored, but n is odd.
    """
    if mirrored and n % 2:
        raise ValueError(f"mirrored pictures come in pairs; n={n} is odd")
    drawn = n // 2 if mirrored else n
    kinds = torch.randint(2, TEMPLATES, (drawn, SIDE, SIDE), generator=generator)
    columns = torch.rand(drawn, SIDE, generator=generator).argsort(1)[:, :2]  # two different ones
    rows = torch.randint(SIDE, (drawn, 2), generator=generator)
    each = torch.arange(drawn)[:, None]
    kinds[each, rows, columns] = torch.arange(2)
    what = ((kinds == 2) | (kinds == 3)).sum((1, 2)) > ((kinds == 4) | (kinds == 5)).sum((1, 2))
    where = columns[:, 0] < columns[:, 1]
    patches = templates()[kinds]  # [n, rows, columns, P, P]
    patches = patches + noise * torch.randn(patches.shape, generator=generator)
    if mirrored:
        patches, what = torch.cat([patches, patches.flip(2)]), what.repeat(2)
        where = torch.cat([where, ~where])
    images = patches.transpose(2, 3).reshape(len(patches), 1, SIDE * PATCH, SIDE * PATCH)
    return images, 2 * what.long() + where.long()


def templates() -> Tensor:
    """The six patches without noise, `[6, 4, 4]`; always the same."""
    return torch.randn(TEMPLATES, PATCH, PATCH, generator=torch.Generator().manual_seed(0))


def digits(generator: torch.Generator, train: int = 1200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split at random.

    Args:
        generator: Source of the split.
        train: Pictures to train on; the rest is held out.

    Returns:
        Training images `[train, 1, 8, 8]` and labels, held-out images and labels. The pixels,
        0 to 16, become -1 to 1.
    """
    from sklearn import datasets

    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=generator)
    images = torch.from_numpy(data.images.astype(np.float32))[order, None] / 8 - 1
    labels = torch.from_numpy(data.target.astype(np.int64))[order]
    return images[:train], labels[:train], images[train:], labels[train:]


def shuffle_patches(images: Tensor, patch_size: int, generator: torch.Generator) -> Tensor:
    """Move the patches of each picture to other places, each picture in an order of its own.

    Args:
        images: `[B, c, H, W]`.
        patch_size: Side of a patch, pixels; it divides H and W.
        generator: Source of the orders, on the CPU.

    Returns:
        Images of the same shape with the same patches.

    Raises:
        ValueError: The pictures have no whole patches.
    """
    *_, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} pixels have no whole patches of side {patch_size}")
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, c, h, P, w, P]
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, N, c, P, P]
    order = torch.rand(x.shape[:2], generator=generator).argsort(1).to(x.device)
    x = x[torch.arange(len(x), device=x.device)[:, None], order]
    x = x.unflatten(1, (height // patch_size, -1)).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(images.shape)
