"""The first level of the dual-tree complex wavelet transform, and its inverse.

Shapes: B images, C channels, H x W tokens. At level 1 the transform is a separable filter bank
without decimation, symmetric at the borders; the high bands are then joined into six complex,
oriented bands of half the size. One matrix product a side does the filtering: a filter with its
border is a banded matrix, and float32 products of matrices, unlike convolutions, do not fall back
to TF32 on a GPU by default.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gatebook.errors import unknown

ANGLES = (15, 45, 75, 105, 135, 165)  # orientation of each complex band, degrees

# Halves of the symmetric low-pass filters, from the centre: analysis h0 and synthesis g0.
FILTERS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "near_sym_a": (  # 5 and 7 taps
        [12 / 20, 5 / 20, -1 / 20],
        [170 / 280, 73 / 280, -15 / 280, -3 / 280],
    ),
    "near_sym_b": (  # 13 and 19 taps
        [0.55546875, 0.296875, -0.0482421875, -0.046875, 0.022265625, 0.0, -0.0017578125],
        [
            0.559430803571,
            0.299757603237,
            -0.0516880580357,
            -0.0556431361607,
            0.0238560267857,
            0.00715680803571,
            -0.00188337053571,
            -0.0013419015067,
            0.0,
            7.06263950893e-5,
        ],
    ),
}


def modulate(half: Sequence[float]) -> list[float]:
    """Turn a low-pass filter into a high-pass one: tap n gets the sign of (-1)^n."""
    return [(-1) ** n * tap for n, tap in enumerate(half)]


def filter_matrix(half: Sequence[float], n: int) -> Tensor:
    """The matrix `[n, n]` of a symmetric filter whose signal is mirrored at both ends.

    The mirror repeats the first and the last sample: x[-1] is x[0], x[n] is x[n - 1].

    Args:
        half: Taps from the centre outwards.
        n: Length of the signal.
    """
    reach = len(half) - 1
    taps = torch.tensor([*reversed(half[1:]), *half])
    place = (torch.arange(n)[:, None] + torch.arange(-reach, reach + 1)) % (2 * n)
    place = torch.where(place < n, place, 2 * n - 1 - place)
    return torch.zeros(n, n).scatter_add(1, place, taps.expand(n, -1))


def check_map(x: Tensor, first: int, height: int, width: int) -> None:
    """Refuse maps of another size than a layer was made for.

    Args:
        x: Maps.
        first: Dimension of their rows; the columns come next.
        height: Rows.
        width: Columns.

    Raises:
        ValueError: The maps have another size.
    """
    if (found := tuple(x.shape[first:][:2])) != (height, width):
        raise ValueError(f"a map of {found[0]}x{found[1]}; this layer takes {height}x{width} only")


class DTCWT(nn.Module):
    """Level 1 of the dual-tree complex wavelet transform of maps of a fixed size.

    `Y = A_h X A_w^T` with `A` the low-pass above the high-pass analysis matrix holds ll, hl
    (above) and lh, hh (below); `X = S_h Y S_w^T` inverts it, as `h0 * g0 + h1 * g1` is one.

    Args:
        height: Rows H, even.
        width: Columns W, even.
        filters: "near_sym_b" or the shorter "near_sym_a".

    Raises:
        ValueError: An odd side or an unknown filter.
    """

    def __init__(self, height: int, width: int, filters: str = "near_sym_b"):
        super().__init__()
        if height % 2 or width % 2:
            raise ValueError(f"a map of {height}x{width} has an odd side; both must be even")
        if filters not in FILTERS:
            raise ValueError(unknown("filters", filters, FILTERS))
        h0, g0 = FILTERS[filters]
        for name, n in (("rows", height), ("columns", width)):
            analysis = [filter_matrix(half, n) for half in (h0, modulate(g0))]
            synthesis = [filter_matrix(half, n) for half in (g0, modulate(h0))]
            self.register_buffer(f"analyse_{name}", torch.cat(analysis), persistent=False)
            self.register_buffer(f"join_{name}", torch.cat(synthesis, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split maps into a low-pass map and six oriented bands.

        Args:
            x: `[B, C, H, W]`.

        Returns:
            The low-pass map `[B, C, H, W]`, and the real and imaginary parts of the complex bands,
            `[B, C, 6, H/2, W/2]` each, in the order of `ANGLES`.

        Raises:
            ValueError: Maps of another size.
        """
        check_map(x, -2, self.join_rows.shape[0], self.join_columns.shape[0])
        y = self.analyse_rows @ x @ self.analyse_columns.T  # [B, C, 2H, 2W]
        (low, hl), (lh, hh) = (half.chunk(2, -1) for half in y.chunk(2, -2))
        quads = torch.stack([lh, hh, hl], 2) / 2**0.5  # [B, C, 3, H, W]
        a, b, c, d = (quads[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        real = torch.cat([a - d, (a + d).flip(2)], 2)
        return low, real, torch.cat([b + c, (b - c).flip(2)], 2)

    def inverse(self, low: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
        """Join what `forward` gives, in the same shapes, into maps `[B, C, H, W]`."""
        (r1, r2), (i1, i2) = (part.chunk(2, 2) for part in (real, imaginary))
        r2, i2 = r2.flip(2), i2.flip(2)
        quads = [torch.stack(pair, -1) for pair in ((r1 + r2, i1 + i2), (i1 - i2, r2 - r1))]
        bands = torch.stack(quads, -3).flatten(-2).flatten(-3, -2) / 2**0.5  # [B, C, 3, H, W]
        lh, hh, hl = bands.unbind(2)
        y = torch.cat([torch.cat([low, hl], -1), torch.cat([lh, hh], -1)], -2)
        return self.join_rows @ y @ self.join_columns.T

    def low_pass(self, x: Tensor) -> Tensor:
        """What `inverse` makes of the low-pass map alone, `[B, C, H, W]`."""
        check_map(x, -2, self.join_rows.shape[0], self.join_columns.shape[0])
        rows, columns = (
            join[:, : len(join)] @ analyse[: len(join)]
            for join, analyse in (
                (self.join_rows, self.analyse_rows),
                (self.join_columns, self.analyse_columns),
            )
        )
        return rows @ x @ columns.T
