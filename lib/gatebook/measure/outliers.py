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
