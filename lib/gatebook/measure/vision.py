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


def head_similarity(weights: Tensor) -> float:
    """Mean cosine similarity between the attention maps of each two heads of a layer.

    Each query's weights are one vector; 1 means that the heads read the same places.

    Args:
        weights: `[B, H, N, N]`, rows are queries.

    Raises:
        ValueError: There are fewer than two heads.
    """
    heads = weights.shape[1]
    if heads < 2:
        raise ValueError(f"{heads} head has no other to be compared with")
    rows = F.normalize(weights.float(), dim=-1).transpose(1, 2)  # [B, N, H, N]
    pairs = rows @ rows.transpose(-1, -2)  # [B, N, H, H]
    others = pairs.sum((-1, -2)) - pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (others.mean() / (heads * (heads - 1))).item()
