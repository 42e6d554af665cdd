"""Which inputs an output reads: by gradient and by perturbation."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_reach(
    function: Callable[[Tensor], Tensor], x: Tensor, position: int, generator: torch.Generator
) -> Tensor:
    """Size of the gradient of one output position with respect to every input position.

    The output vector is projected on a random direction first: a fixed one, such as the sum, can
    have no gradient at all behind a normalisation.

    Args:
        function: Maps [B, T, D] to [B, T, E].
        x: Input, [B, T, D].
        position: Output position.
        generator: Source of the direction.

    Returns:
        Euclidean norms, [T]; exactly zero where the output does not read the input.
    """
    x = x.detach().requires_grad_()
    y = function(x)[:, position]
    direction = torch.randn(y.shape[-1], generator=generator, dtype=y.dtype).to(y.device)
    (gradient,) = torch.autograd.grad((y @ direction).sum(), x)
    return gradient.square().sum((0, 2)).sqrt()


@torch.no_grad()
def perturbation_reach(
    function: Callable[[Tensor], Tensor], tokens: Tensor, vocab_size: int
) -> Tensor:
    """How much every output changes when one input token is replaced.

    Args:
        function: Maps token ids [B, T] to [B, T, E]; without dropout.
        tokens: One sequence, [T].
        vocab_size: A token v is replaced by v + 1 modulo this number.

    Returns:
        Largest absolute change, [T inputs, T outputs]; exactly zero where an output does not
        read the input.
    """
    length = len(tokens)
    changed = tokens.repeat(length, 1)
    changed.diagonal().add_(1).remainder_(vocab_size)
    before = function(tokens.repeat(length, 1))  # the same shape, so the same rounding
    return (function(changed) - before).abs().amax(-1)
