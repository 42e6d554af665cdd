"""Which inputs an output reads: by gradient and by perturbation."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_reach(
    function: Callable[[Tensor], Tensor], x: Tensor, position: int, generator: torch.Generator
) -> Tensor:
    """Size of the gradient of one output position with respect to every input position.

    Args:
        function: Maps [B, T, D] to [B, T, E].
        x: Input, [B, T, D].
        position: Output position.
        generator: Source of the direction.

    Returns:
        Euclidean norms, [T]; exactly zero where the output does not read the input.
    """
    x = x.detach().requires_grad_()
    return input_gradient(function(x)[:, position], x, generator, channels=2)


def input_gradient(y: Tensor, x: Tensor, generator: torch.Generator, channels: int = 1) -> Tensor:
    """Size of the gradient of one place of the output with respect to every place of the input.

    The output vector is projected on a random direction first: a fixed one, such as the sum, can
    have no gradient at all behind a normalisation.

    Args:
        y: The place of the output, [B, E].
        x: The input that it comes from, [B, ...], with `requires_grad`.
        generator: Source of the direction.
        channels: Dimension of x that holds its features.

    Returns:
        Euclidean norms over the batch and the features, x's other dimensions; exactly zero where
        the output does not read the input.

    Raises:
        ValueError: y is not a matrix, or `channels` is no dimension of x but the first.
    """
    if y.ndim != 2:
        raise ValueError(f"y is one place of the output, [B, E]; got {list(y.shape)}")
    if not 0 < channels < x.ndim:
        raise ValueError(f"channels must be in 1 to {x.ndim - 1}, got {channels}")
    direction = torch.randn(y.shape[-1], generator=generator, dtype=y.dtype).to(y.device)
    (gradient,) = torch.autograd.grad((y @ direction).sum(), x)
    return gradient.square().sum((0, channels)).sqrt()


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
