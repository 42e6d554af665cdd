"""Generated tasks with a label at each token: the next marker on a line, the pixel above."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # label of a token that has none, as in `cross_entropy`


def next_marker(
    n: int, length: int, generator: torch.Generator, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Lines of blanks and markers A and B; a token's label is the type of the next marker.

    "Next" is the first marker strictly to the right. Types are fair coins, so whoever sees nothing
    to the right is right half of the time. Whoever sees both sides, but not which is which, can do
    no better than name the type that both nearest markers have, or guess.

    Args:
        n: Number of lines.
        length: Tokens of a line, N.
        generator: Source of every random number.
        rate: Probability that a token is a marker.

    Returns:
        One-hot tokens `[n, 1, N, 3]` (blank, A, B) and labels `[n, 1, N]`: 0 for A, 1 for B,
        `IGNORE` where no marker follows.
    """
    marked = torch.rand(n, length, generator=generator) < rate
    kind = torch.randint(2, (n, length), generator=generator)
    place = torch.arange(length).expand(n, length).masked_fill(~marked, length)
    later = F.pad(place[:, 1:], (0, 1), value=length)  # markers from the token on the right on
    next_place = later.flip(1).cummin(1).values.flip(1)
    labels = F.pad(kind, (0, 1), value=IGNORE).gather(1, next_place)
    tokens = F.one_hot(torch.where(marked, kind + 1, 0), 3).float()
    return tokens[:, None], labels[:, None]


def xor_above(n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grids of fair bits; a pixel's label is its own bit XOR the bit of the pixel above.

    Args:
        n: Number of grids.
        side: Rows and columns.
        generator: Source of every random number.

    Returns:
        Bits as -1 or 1 `[n, side, side, 1]` and labels `[n, side, side]`, `IGNORE` in the first
        row.
    """
    bits = torch.randint(2, (n, side, side), generator=generator)
    labels = torch.full_like(bits, IGNORE)
    labels[:, 1:] = bits[:, 1:] ^ bits[:, :-1]
    return (2.0 * bits - 1)[..., None], labels
