"""A cue and four glyphs far from it: which sign has the glyph of the cue's type?"""

import torch
from torch import Tensor

TYPES = 4


def cued_glyph(
    n: int, generator: torch.Generator, rows: int = 4, columns: int = 7
) -> tuple[Tensor, Tensor]:
    """Maps with a cue in the first column and one glyph of each type in the last two.

    Channels 0 to 3 are a type, one-hot; channel 4 is a glyph's sign. The first column holds the
    cue, a type without a sign. Two of the four glyphs are positive, two negative, at random places.
    The label is the sign of the glyph that has the cue's type.

    Cue and glyphs are at least five columns apart, so nothing within two positions sees both. A
    model whose logit is a sum over such windows has no better cross-entropy than ln 2 (Jensen: for
    each cue, and for each arrangement of glyphs, the margin's mean is 0). An average over the map
    of linear functions of its positions is the same for both labels, too: each type is there once,
    with as many positive as negative signs. A variance over the map, such as a norm takes, is not.

    Args:
        n: Number of maps.
        generator: Source of every random number.
        rows: Height of a map, at least 2.
        columns: Width of a map, at least 7.

    Returns:
        Maps `[n, 5, rows, columns]` and labels `[n]`, 1 for a positive sign.

    Raises:
        ValueError: The map is too small.
    """
    if rows < 2 or columns < 7:
        raise ValueError(f"a map needs 2 rows and 7 columns or more, got {rows} and {columns}")
    each, types = torch.arange(n)[:, None], torch.arange(TYPES)[None]
    cue = torch.randint(TYPES, (n,), generator=generator)
    places = torch.rand(n, 2 * rows, generator=generator).argsort(1)[:, :TYPES]
    order = torch.rand(n, TYPES, generator=generator).argsort(1)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])[order]
    maps = torch.zeros(n, TYPES + 1, rows, columns)
    maps[each[:, 0], cue, :, 0] = 1
    row, column = places // 2, columns - 2 + places % 2
    maps[each, types, row, column] = 1
    maps[each, TYPES, row, column] = signs
    return maps, (signs[each[:, 0], cue] > 0).long()
