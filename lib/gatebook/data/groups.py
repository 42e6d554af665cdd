"""The word problems of small groups: what is the product of all elements so far?"""

import itertools

import torch
from torch import Tensor


def group_table(name: str) -> Tensor:
    """The multiplication table `[G, G]` of a group: "parity" (two elements) or "s3" (six).

    Entry (a, b) is the number of a·b, which applies a first and then b; 0 is the identity.

    Raises:
        ValueError: Another name.
    """
    if name not in ("parity", "s3"):
        raise ValueError(f"the groups are parity and s3; got {name!r}")
    elements = list(itertools.permutations(range(2 if name == "parity" else 3)))
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def group_words(
    n: int, length: int, group: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The word problem of a group: after each element, what is the product of all so far?

    Args:
        n: Number of sequences.
        length: Elements in each, T.
        group: As in `group_table`.
        generator: Source of every random number.

    Returns:
        Elements `[n, T]` and products `[n, T]`, both by number.
    """
    table = group_table(group)
    tokens = torch.randint(len(table), (n, length), generator=generator)
    product, products = torch.zeros(n, dtype=torch.long), []
    for t in range(length):
        product = table[product, tokens[:, t]]
        products.append(product)
    return tokens, torch.stack(products, 1)
