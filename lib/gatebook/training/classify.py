"""Training a classifier in a notebook: cross-entropy, and CUDA graphs on a GPU."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.training import graphs
from gatebook.training.fit import History, fit
from gatebook.training.recipe import Recipe


def fit_classifier(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    device: str = "cpu",
    progress: Callable[..., Iterable[int]] | None = None,
) -> History:
    """Train in place with cross-entropy; on a GPU by replayed graphs.

    Args:
        model: Maps images `[B, C, H, W]` to logits `[B, K]`.
        batches: Pairs of images and class numbers `[B]`, or class shares `[B, K]`; can be read
            more than once, and on a GPU all of one shape.
        recipe: Steps, optimiser and precision.
        device: Where it is trained.
        progress: As in `fit`.

    Returns:
        The history of `fit`.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    if device == "cuda":
        graphs.capture(model, next(iter(batches))[0].to(device), recipe.precision)
    return fit(
        model,
        batches,
        lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
        recipe,
        device=device,
        progress=progress,
    )
