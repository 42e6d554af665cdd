"""Attention sinks and outliers: where attention is parked, and how large activations grow."""

from torch import Tensor


def first_token_share(weights: Tensor, start: int, queries: Tensor | None = None) -> float:
    """Mean attention weight that the first token gets; uniform attention gives 1 / (t + 1).

    Args:
        weights: `[B, H, T, T]`, query by key.
        start: First query that counts, counted from 0: early rows have few keys, and so a large
            share whatever the model does.
        queries: Which queries count, `[B, T]`; None counts all from `start` on.

    Raises:
        ValueError: No query counts.
    """
    share = weights[..., 0].mean(1)[:, start:]  # (B, T - start)
    if queries is not None:
        share = share[queries[:, start:]]
    if share.numel() == 0:
        raise ValueError(f"no query from position {start} on")
    return share.mean().item()


def largest_activation(hidden: Tensor) -> float:
    """Largest magnitude in a batch of hidden states of any shape."""
    return hidden.abs().max().item()


def infinity_norm(x: Tensor) -> float:
    """Largest magnitude of each sequence, averaged over sequences: `[B, ...]`, in units of x."""
    return x.flatten(1).abs().amax(1).float().mean().item()


def kurtosis(x: Tensor) -> float:
    """Fourth standardised moment of each sequence, averaged over sequences; 3 for normal numbers.

    mean((x − μ)⁴) / (s⁴ + 10⁻⁶) over all numbers of a sequence, s with n − 1 in its denominator,
    as Bondarenko et al. (2023) compute it.

    Args:
        x: `[B, ...]`.
    """
    x = x.flatten(1).double()
    centred = x - x.mean(1, keepdim=True)
    return (centred.pow(4).mean(1) / (x.std(1).pow(4) + 1e-6)).mean().item()
