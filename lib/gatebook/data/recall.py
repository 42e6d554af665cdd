"""Tasks of memory: recall of pairs, alone or within a chain of symbols, and copying."""

import torch
from torch import Tensor

from gatebook.data.synthetic import IGNORE


def associative_recall(
    n: int,
    length: int,
    pairs: int,
    n_keys: int,
    n_values: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Arora et al. 2023): pairs of a key and a value, then queries.

    The first 2 P tokens are P different keys, each followed by a value. Every key then comes once
    more, in random order and at random places; there the model has to answer with its value. All
    other places hold the filler.

    Tokens: 0 filler; 1..n_keys keys; then n_values values.

    Args:
        n: Number of sequences.
        length: Tokens in each, T; at least 3 P.
        pairs: P, at most n_keys.
        n_keys: Different keys.
        n_values: Different values.
        generator: Source of every random number.

    Returns:
        Tokens `[n, T]` and targets `[n, T]`: the token of the value at a query, else `IGNORE`.

    Raises:
        ValueError: The sequence is too short, or the keys are too few.
    """
    if length < 3 * pairs or not 1 <= pairs <= n_keys:
        raise ValueError(
            f"{pairs} pairs need at least {3 * pairs} tokens and {pairs} keys; got {length} and "
            f"{n_keys}"
        )
    keys = 1 + torch.rand(n, n_keys, generator=generator).argsort(-1)[:, :pairs]
    values = 1 + n_keys + torch.randint(n_values, (n, pairs), generator=generator)
    places = torch.rand(n, length - 2 * pairs, generator=generator).argsort(-1)[:, :pairs]
    places = places + 2 * pairs
    tokens = torch.zeros(n, length, dtype=torch.long)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens.scatter_(1, places, keys)
    targets = torch.full((n, length), IGNORE).scatter_(1, places, values)
    return tokens, targets


def copying(
    n: int, length: int, n_symbols: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random symbols, a mark, and the same symbols again.

    Tokens: 0..n_symbols − 1 symbols; n_symbols the mark. The input after the mark is the copy so
    far, so that the model predicts each symbol from all before it.

    Args:
        n: Number of sequences.
        length: Symbols to copy, L.
        n_symbols: Different symbols.
        generator: Source of every random number.

    Returns:
        Tokens `[n, 2 L]` and targets `[n, 2 L]`: the symbols at the mark and after it, before it
        `IGNORE`.
    """
    symbols = torch.randint(n_symbols, (n, length), generator=generator)
    mark = torch.full((n, 1), n_symbols)
    tokens = torch.cat([symbols, mark, symbols[:, :-1]], 1)
    return tokens, torch.cat([torch.full_like(symbols, IGNORE), symbols], 1)


def second_order_chain(n_symbols: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Transition probabilities `[S, S, S]` of a random chain: which symbol follows the last two.

    Args:
        n_symbols: S.
        temperature: Of the softmax over normal logits; lower is more predictable.
        generator: Source of every random number.
    """
    logits = torch.randn(n_symbols, n_symbols, n_symbols, generator=generator)
    return (logits / temperature).softmax(-1)


def recall_in_chain(
    n: int,
    length: int,
    pairs: int,
    n_keys: int,
    n_values: int,
    chain: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """`associative_recall` whose filler is a chain of symbols, so that one sequence asks for both:
    the value of a key, and the next symbol from the last two.

    Tokens: 0..S − 1 symbols; then n_keys keys; then n_values values. The pairs come first. At a
    symbol the target is the next symbol of the chain, across the queries that lie between.

    Args:
        n: Number of sequences.
        length: Tokens in each, T; more than 3 P.
        pairs: P.
        n_keys: Different keys.
        n_values: Different values.
        chain: Transition probabilities `[S, S, S]`.
        generator: Source of every random number.

    Returns:
        Tokens `[n, T]`; targets `[n, T]`, `IGNORE` in the pairs; and the loss in nats `[n, T]` of
        who knows the chain and its last two symbols, 0 where the target is no symbol.
    """
    tokens, targets = associative_recall(n, length, pairs, n_keys, n_values, generator)
    symbols = len(chain)
    places = tokens[:, 2 * pairs :] == 0  # (n, T - 2 P), as many in each row
    count = length - 3 * pairs
    drawn = torch.randint(symbols, (n, 2), generator=generator).unbind(1)
    words, odds = list(drawn), []
    for _ in range(count):
        after = chain[words[-2], words[-1]]  # (n, S)
        words.append(torch.multinomial(after, 1, generator=generator).squeeze(1))
        odds.append(after.gather(1, words[-1].unsqueeze(1)).squeeze(1))
    text = torch.stack(words[1:], 1)  # (n, count + 1): the second symbol drawn is the first shown
    tokens = torch.where(tokens > 0, tokens + symbols - 1, tokens)
    targets = torch.where(targets >= 0, targets + symbols - 1, targets)
    loss = torch.zeros(n, length)
    rest = slice(2 * pairs, None)
    tokens[:, rest][places] = text[:, :-1].flatten()
    targets[:, rest][places] = text[:, 1:].flatten()
    loss[:, rest][places] = -torch.stack(odds, 1).log().flatten()
    return tokens, targets, loss
