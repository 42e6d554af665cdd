"""Scores of an image classifier."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well a classifier does on held-out images."""

    accuracy: float  # top-1, fraction
    cross_entropy: float  # mean, nats
    images: int  # number of images


@torch.no_grad()
def score(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: str = "cpu"
) -> Scores:
    """Classify every batch once, in evaluation mode.

    Args:
        model: `[B, c, H, W]` to logits `[B, K]`.
        batches: Pairs of images and class numbers `[B]`.
        device: Where the model is.

    Raises:
        ValueError: There are no images.
    """
    model.eval()
    right, loss, images = 0.0, 0.0, 0
    for x, labels in batches:
        labels = labels.to(device)
        logits = model(x.to(device)).float()
        right += (logits.argmax(-1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        images += len(labels)
    if not images:
        raise ValueError("no images to score")
    return Scores(accuracy=float(right) / images, cross_entropy=float(loss) / images, images=images)
