"""What some recipes do at every optimiser step beside it: averaged weights, adaptive clipping.

Both hang on torch's hooks of the optimiser, so that the loop knows nothing of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gatebook.training import checkpoint


class Average:
    """Batches, and beside them the moving average of a model's weights (Polyak, 1992).

    After each step an averaged weight is `decay` times itself plus the rest of the new weight, and
    so are buffers of floating point, such as the statistics of batch norms, which belong to the
    weights. The average is part of the batches' state, so that a run that goes on from a
    checkpoint goes on with it.

    Example::

        average = Average(batches, model, 0.9999)
        with average.following():
            fit(model, average, loss, recipe)
        average.apply()
    """

    def __init__(self, batches: Any, model: nn.Module, decay: float) -> None:
        """Starts from the model's weights.

        Args:
            batches: Training batches whose place can be saved.
            model: Is trained on them, without being sharded.
            decay: In (0, 1).

        Raises:
            ValueError: A decay that is not in (0, 1), or batches without `state_dict`.
        """
        if not 0 < decay < 1:
            raise ValueError(f"the decay of an average is in (0, 1); got {decay}")
        if not checkpoint.has_state(batches):
            raise ValueError("averaged weights need batches with state_dict and load_state_dict")
        self.batches, self.model = batches, model
        self.weights = [p.detach().clone() for p in self._current()]
        self.mean = get_ema_multi_avg_fn(decay)

    @contextmanager
    def following(self) -> Iterator[None]:
        """While it is open, every step of an optimiser counts."""
        handle = register_optimizer_step_post_hook(self._update)
        try:
            yield
        finally:
            handle.remove()

    def _current(self) -> list[torch.Tensor]:
        """The model's parameters, and its buffers of floating point."""
        buffers = (b for b in self.model.buffers() if b.is_floating_point())
        return [*self.model.parameters(), *buffers]

    def _update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        current = [p.detach() for p in self._current()]
        self.weights = [w.to(p.device) for w, p in zip(self.weights, current, strict=True)]
        self.mean(self.weights, current, None)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged weights."""
        for p, w in zip(self._current(), self.weights, strict=True):
            p.copy_(w)

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and the average on the CPU."""
        weights = [w.cpu().clone() for w in self.weights]
        return {"batches": self.batches.state_dict(), "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with a saved place and average."""
        self.batches.load_state_dict(state["batches"])
        self.weights = state["weights"]

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """One state from those of all processes, whose averages are alike."""
        merged = self.batches.merge_states([state["batches"] for state in states])
        return {"batches": merged, "weights": states[0]["weights"]}


@contextmanager
def adaptive_clipping(model: nn.Module, ratio: float) -> Iterator[None]:
    """Clip gradients unit by unit while it is open (Brock et al., 2021).

    The gradient of an output unit (a row of a matrix, a filter of a convolution) is at most `ratio`
    times as long as its weights, whose length counts as at least 0.001. Parameters of one dimension
    are one unit each.

    Raises:
        ValueError: The ratio is not positive.
    """
    if ratio <= 0:
        raise ValueError(f"the ratio of adaptive clipping is positive; got {ratio}")

    @torch.no_grad()
    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p in model.parameters():
            if p.grad is not None:
                largest = ratio * _lengths(p).clamp(min=1e-3)
                p.grad.mul_((largest / _lengths(p.grad).clamp(min=1e-6)).clamp(max=1.0))

    handle = register_optimizer_step_pre_hook(clip)
    try:
        yield
    finally:
        handle.remove()


def _lengths(x: Tensor) -> Tensor:
    """The norm of each unit, of a shape that x can be divided by."""
    over = tuple(range(1, x.dim())) if x.dim() > 1 else None
    return torch.linalg.vector_norm(x, dim=over, keepdim=x.dim() > 1)
