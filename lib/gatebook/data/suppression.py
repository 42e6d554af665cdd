"""A task that asks a token mixer to say nothing at some tokens: the mean of a map, or zero."""

import torch
from torch import Tensor


def mean_or_nothing(
    n: int, generator: torch.Generator, side: int = 8, channels: int = 4
) -> tuple[Tensor, Tensor]:
    """Maps of contents and flags; a token without flag wants the map's mean, one with flag 0.

    Contents are independent normal numbers and half of the flags are set, both at random. The
    mean is scaled by `side`, so that it has variance 1.

    A model whose output does not depend on a token's own flag has at best half of the mean
    everywhere: R² = 1/2, and a mean square of 1/4 at the flagged tokens.

    Args:
        n: Number of maps.
        generator: Source of every random number.
        side: Rows and columns of a map.
        channels: Numbers in a token's content.

    Returns:
        Inputs `[n, side, side, channels + 1]`, the last channel the flag as 1 or -1; targets
        `[n, side, side, channels]`.
    """
    content = torch.randn(n, side, side, channels, generator=generator)
    flag = 2.0 * torch.randint(2, (n, side, side, 1), generator=generator) - 1
    mean = side * content.mean((1, 2), keepdim=True)
    return torch.cat([content, flag], -1), mean * (flag < 0)


def sum_of_the_informative(
    n: int, generator: torch.Generator, side: int = 8, channels: int = 4
) -> tuple[Tensor, Tensor]:
    """Maps of contents and flags; every token wants the sum of the contents without a flag.

    A token is informative with probability 1/4 and a distractor, with a flag, otherwise. Contents
    are independent normal numbers. The sum is divided by `side / 2`, so that it has variance 1.

    A model that can't tell distractors from others has at best a quarter of the sum over the map:
    R² = 1/4.

    Args:
        n: Number of maps.
        generator: Source of every random number.
        side: Rows and columns of a map.
        channels: Numbers in a token's content.

    Returns:
        Inputs `[n, side, side, channels + 1]`, the last channel the flag as 1 or -1; targets
        `[n, side, side, channels]`, the same at all tokens of a map.
    """
    content = torch.randn(n, side, side, channels, generator=generator)
    flag = 2.0 * (torch.rand(n, side, side, 1, generator=generator) < 0.75) - 1
    total = (content * (flag < 0)).sum((1, 2), keepdim=True) / (side / 2)
    return torch.cat([content, flag], -1), total.expand_as(content)
