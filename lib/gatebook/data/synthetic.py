"""Generated tasks whose answers, chance levels or entropies are known exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # target that `torch.nn.functional.cross_entropy` leaves out


def lag_copy(
    n: int, length: int, n_symbols: int, lags: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Uniform random symbols; the targets are the symbols seen `lag` positions earlier.

    A model whose output reads fewer than `lag + 1` tokens answers that lag at chance,
    1 / `n_symbols`, because the symbols are independent.

    Args:
        n: Number of sequences.
        length: Tokens in each, T.
        n_symbols: Size of the alphabet.
        lags: Distances to copy from; all are asked at every position.
        generator: Source of every random number.

    Returns:
        Tokens [n, T] and targets [n, T, len(lags)], `IGNORE` where the lag reaches before the
        start.
    """
    tokens = torch.randint(n_symbols, (n, length), generator=generator)
    targets = torch.full((n, length, len(lags)), IGNORE)
    for i, lag in enumerate(lags):
        targets[:, lag:, i] = tokens[:, : length - lag]
    return tokens, targets


@dataclass(frozen=True)
class MarkovText:
    """Stationary text in which each symbol depends on the two before it.

    Attributes:
        transition: P(x_t = c | x_{t-2} = a, x_{t-1} = b), [n, n, n], float64.
        pairs: Stationary probability of the pair (a, b), [n, n], float64.
    """

    transition: Tensor
    pairs: Tensor

    def entropy(self, order: int) -> float:
        """Conditional entropy of a symbol given the `order` before it, in nats.

        It is the least expected cross-entropy of any model that reads `order` tokens.

        Args:
            order: 0, 1 or 2.

        Raises:
            ValueError: For another order.
        """
        joint = self.pairs[..., None] * self.transition  # P(a, b, c)
        if order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {order}")
        joint = joint.sum(dim=(0, 1)[: 2 - order]) if order < 2 else joint
        context = joint.sum(-1, keepdim=True)
        return float(-torch.xlogy(joint, joint / context).sum())

    def sample(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """Draws `n` sequences that start in the stationary distribution: [n, length]."""
        size = self.pairs.shape[0]
        start = torch.multinomial(self.pairs.flatten(), n, replacement=True, generator=generator)
        tokens = [start // size, start % size]
        while len(tokens) < length:
            rows = self.transition[tokens[-2], tokens[-1]]  # (n, size)
            tokens.append(torch.multinomial(rows, 1, generator=generator)[:, 0])
        return torch.stack(tokens[:length], dim=1)

    def next_symbol(self, tokens: Tensor) -> Tensor:
        """True distribution after each position from the second on: [B, T] -> [B, T-1, n]."""
        return self.transition[tokens[:, :-1], tokens[:, 1:]]


def markov_text(n_symbols: int, temperature: float, generator: torch.Generator) -> MarkovText:
    """A random order-2 chain: softmax of normal scores, one row for each pair.

    Args:
        n_symbols: Size of the alphabet.
        temperature: Of the softmax; lower makes the text more predictable.
        generator: Source of the scores.

    Returns:
        The chain with its stationary distribution, found by power iteration to 1e-14.
    """
    shape = (n_symbols, n_symbols, n_symbols)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    transition = torch.softmax(scores / temperature, dim=-1)
    pairs = torch.full((n_symbols, n_symbols), n_symbols**-2.0, dtype=torch.float64)
    change = 1.0
    while change > 1e-14:
        after = torch.einsum("ab,abc->bc", pairs, transition)
        change, pairs = float((after - pairs).abs().sum()), after
    return MarkovText(transition, pairs / pairs.sum())


N_TRIGGERS = 4  # tokens 0..3 of `BackCopy`


@dataclass(frozen=True)
class BackCopy:
    """Bigram text in which a few tokens ask for a look back, and all others for none.

    A sequence is BOS, a uniform symbol, then one symbol after another. After a trigger (a symbol
    below `N_TRIGGERS`) the next symbol repeats the one before the trigger; after any other, and
    after a trigger that BOS precedes, it is drawn from the bigram table. A model that knows the
    last token needs attention for the triggers alone.

    Attributes:
        bigram: P(next = b | last = a), [n, n], float64.
    """

    bigram: Tensor

    @property
    def bos(self) -> int:
        """The token that starts every sequence; the vocabulary has one more than that."""
        return self.bigram.shape[0]

    def sample(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """Draws `n` sequences of BOS and `length` symbols: [n, 1 + length]."""
        tokens = torch.full((n, 1 + length), self.bos)
        for t in range(length):
            rows = self.next_symbol(tokens[:, : t + 1])[:, -1]
            tokens[:, t + 1] = torch.multinomial(rows, 1, generator=generator)[:, 0]
        return tokens

    def next_symbol(self, tokens: Tensor) -> Tensor:
        """True distribution after each position: [B, T] from BOS on -> [B, T, n]."""
        size = self.bos
        uniform = torch.full((1, size), 1 / size, dtype=self.bigram.dtype)
        found = torch.cat([self.bigram, uniform])[tokens]  # (B, T, n)
        row, t = back_copy_triggers(tokens).nonzero(as_tuple=True)
        found[row, t] = torch.eye(size, dtype=found.dtype)[tokens[row, t - 1]]
        return found

    def entropy(self, tokens: Tensor) -> Tensor:
        """Entropy in nats of the symbol after each position, the floor of any loss: [B, T]."""
        found = self.next_symbol(tokens)
        return -torch.xlogy(found, found).sum(-1)


def back_copy(n_symbols: int, generator: torch.Generator) -> BackCopy:
    """A random `BackCopy`: rows of uniform numbers to the sixth power, normed to sum one.

    Args:
        n_symbols: Size of the alphabet, without BOS.
        generator: Source of the table.

    Raises:
        ValueError: Unless there are more symbols than triggers.
    """
    if n_symbols <= N_TRIGGERS:
        raise ValueError(f"n_symbols must be above the {N_TRIGGERS} triggers, got {n_symbols}")
    table = torch.rand(n_symbols, n_symbols, generator=generator, dtype=torch.float64) ** 6
    return BackCopy(table / table.sum(-1, keepdim=True))


def back_copy_triggers(tokens: Tensor) -> Tensor:
    """Positions of `BackCopy` sequences whose next symbol is a copy: mask [B, T]."""
    return (tokens < N_TRIGGERS) & (torch.arange(tokens.shape[1], device=tokens.device) > 1)


def drifting_lexicon(
    chain: MarkovText,
    n: int,
    length: int,
    generator: torch.Generator,
    *,
    favourites: int = 3,
    share: float = 0.5,
    drift: float = 0.02,
) -> Tensor:
    """Text with a short and a long memory: grammar from a chain, words from a lexicon that drifts.

    Each sequence has a lexicon, a random set of symbols. A symbol follows `chain` with probability
    1 − share; else it is a uniform draw from the lexicon, which a reader has to infer from what was
    drawn before. At each step a new lexicon replaces the old one with probability `drift`.

    Args:
        chain: What the two symbols before say of the next.
        n: Number of sequences.
        length: Symbols in each, T, at least 2.
        generator: Source of every random number.
        favourites: Symbols in a lexicon.
        share: Probability of a draw from the lexicon.
        drift: Probability of a new lexicon at each step.

    Returns:
        Symbols [n, T].
    """
    size, rows = chain.pairs.shape[0], torch.arange(n)

    def lexicons() -> Tensor:
        return torch.rand(n, size, generator=generator).argsort(-1)[:, :favourites]

    lexicon = lexicons()
    tokens = list(chain.sample(n, 2, generator).unbind(1))
    while len(tokens) < length:
        renewed = torch.rand(n, 1, generator=generator) < drift
        lexicon = torch.where(renewed, lexicons(), lexicon)
        grammar = torch.multinomial(
            chain.transition[tokens[-2], tokens[-1]], 1, generator=generator
        )[:, 0]
        word = lexicon[rows, torch.randint(favourites, (n,), generator=generator)]
        drawn = torch.rand(n, generator=generator) < share
        tokens.append(torch.where(drawn, word, grammar))
    return torch.stack(tokens, dim=1)


N_RESET_KEYS = 6  # keys of each group of `typed_reset_recall`
N_VALUES = 8
UNKNOWN = N_VALUES  # the answer "none": never written, or forgotten at a reset
TYPED_RESET_TOKENS = 1 + 2 * N_RESET_KEYS * N_VALUES + 2 * N_RESET_KEYS


def typed_reset_recall(n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Recall with one memory that lasts and one that a reset token clears.

    Six keys of group A are written at most once and last. Six keys of group B are written at most
    once between two resets, and hold only until the next RESET. At each step: RESET with
    probability 0.08, a write to A 0.22, a write to B 0.30, else a query for one of the twelve
    keys; a write for which no key is left becomes a query. A memory that forgets everything at
    once answers one group or the other, so the task separates one gate for the whole state from
    a gate for each channel.

    Tokens: 0 RESET; 1 + 8 k + v writes value v to key k (A has k = 0..5, B 6..11); 97 + k asks k.

    Args:
        n: Number of sequences.
        length: Tokens in each, T.
        generator: Source of every random number.

    Returns:
        Tokens [n, T] and targets [n, T]: at a query 0..7 or `UNKNOWN`, elsewhere `IGNORE`.
    """
    first_query = 1 + 2 * N_RESET_KEYS * N_VALUES
    memory = torch.full((n, 2 * N_RESET_KEYS), UNKNOWN)
    rows = torch.arange(n)
    tokens, targets = torch.empty(2, n, length, dtype=torch.long)
    for t in range(length):
        kind = torch.rand(n, generator=generator)
        reset, to_b = kind < 0.08, (kind >= 0.30) & (kind < 0.60)
        # a random order of the keys; the free ones of the chosen group come first
        free = (memory == UNKNOWN).view(n, 2, N_RESET_KEYS)[rows, to_b.long()]
        order = torch.rand(n, N_RESET_KEYS, generator=generator) + free
        key = order.argmax(-1) + N_RESET_KEYS * to_b
        write = (kind >= 0.08) & (kind < 0.60) & free.any(-1)
        value = torch.randint(N_VALUES, (n,), generator=generator)
        asked = torch.randint(2 * N_RESET_KEYS, (n,), generator=generator)
        targets[:, t] = torch.where(reset | write, IGNORE, memory[rows, asked])
        tokens[:, t] = torch.where(write, 1 + N_VALUES * key + value, first_query + asked)
        tokens[reset, t] = 0
        memory[rows[write], key[write]] = value[write]
        memory[reset, N_RESET_KEYS:] = UNKNOWN
    return tokens, targets


def typed_reset_groups(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions ask for a key of group A and which for one of group B: two masks [n, T]."""
    key = tokens - (1 + 2 * N_RESET_KEYS * N_VALUES)
    asked = targets != IGNORE
    return asked & (key < N_RESET_KEYS), asked & (key >= N_RESET_KEYS)


def lag_copy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `lag_copy`, averaged within each lag and then over the lags.

    A long lag has fewer targets in a short sequence; this gives all lags one weight.

    Args:
        logits: [B, T, n_lags, V].
        targets: [B, T, n_lags].

    Returns:
        Scalar, in nats.
    """
    losses = [
        torch.nn.functional.cross_entropy(
            logits[:, :, i].flatten(0, 1), targets[:, :, i].flatten(), ignore_index=IGNORE
        )
        for i in range(targets.shape[-1])
    ]
    return torch.stack(losses).mean()


def lag_copy_hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Right answers and questions for each lag: [B, T, n_lags, V] -> two of [n_lags]."""
    asked = targets != IGNORE
    right = (logits.argmax(-1) == targets) & asked
    return right.sum((0, 1)), asked.sum((0, 1))
