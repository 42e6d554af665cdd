"""Lookups of several places at once."""

import torch
from torch import Tensor

IGNORE = -100  # the target of a way that is not asked; `cross_entropy` leaves it out


def multi_lookup(
    n: int,
    n_pairs: int,
    n_values: int,
    n_ways: int,
    generator: torch.Generator,
    n_asked: int = 0,
) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then one token that asks for the values of several keys at once.

    Every key stands once, in random order; values are independent and uniform, so that chance is
    1 / `n_values`. The asked keys are drawn with replacement, one for each way; the same key has
    another symbol in each way, so that the question says which answer goes where.

    Symbols: 0 none; 1 + k key k; 1 + K + v value v; 1 + K + V + w K + k asks for key k in way w,
    with K keys and V values.

    Args:
        n: Number of sequences.
        n_pairs: K, keys and pairs in a sequence.
        n_values: V.
        n_ways: M, at least 2 (a pair takes two symbols).
        generator: Source of every random number.
        n_asked: Ways, drawn for each sequence, in which something is asked; 0 asks in all.

    Returns:
        Symbols [n, K + 1, M], of which the model sums the embeddings, and values asked for [n, M],
        `IGNORE` in ways that are not asked.

    Raises:
        ValueError: `n_ways` below 2, or `n_asked` above it.
    """
    if n_ways < 2 or not 0 <= n_asked <= n_ways:
        raise ValueError(f"n_ways is at least 2 and at least n_asked; got {n_ways}, {n_asked}")
    keys = torch.rand(n, n_pairs, generator=generator).argsort(1)
    values = torch.randint(n_values, (n, n_pairs), generator=generator)
    asked = torch.randint(n_pairs, (n, n_ways), generator=generator)  # places in the sequence
    symbols = torch.zeros(n, n_pairs + 1, n_ways, dtype=torch.long)
    symbols[:, :-1, 0], symbols[:, :-1, 1] = 1 + keys, 1 + n_pairs + values
    ways = n_pairs * torch.arange(n_ways)
    symbols[:, -1] = 1 + n_pairs + n_values + ways + keys.gather(1, asked)
    answers = values.gather(1, asked)
    if n_asked:
        silent = torch.rand(n, n_ways, generator=generator).argsort(1) >= n_asked
        symbols[:, -1][silent], answers[silent] = 0, IGNORE
    return symbols, answers


def multi_lookup_symbols(n_pairs: int, n_values: int, n_ways: int) -> int:
    """Number of symbols of `multi_lookup`, the empty one included."""
    return 1 + n_pairs + n_values + n_ways * n_pairs
