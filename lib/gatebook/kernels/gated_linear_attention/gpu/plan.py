"""How the work is cut: tiles for each shape and type, chunks and segments for each batch."""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

PROGRAMS = 128  # of a sweep, from which on it fills a GPU


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One kind of sweep: value columns of a program, and its compiler options."""

    columns: int
    options: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of each kernel, with warps, pipeline stages and registers a thread."""

    chunk: int  # C
    width: int  # WIDTH, K padded to a power of two
    prepare: dict[str, int]
    output: Sweep  # O
    states: Sweep  # the states alone
    backward: Sweep  # dV and the states' gradients
    score_gradients: dict[str, int]
    gradients: dict[str, int]
    step: dict[str, int]


def power_of_two(n: int) -> int:
    """The least power of two from n on, at least the 16 that a tensor core takes."""
    return max(16, 1 << (n - 1).bit_length())


def _options(warps: int, stages: int, **more: int) -> dict[str, int]:
    return {**more, "num_warps": warps, "num_stages": stages}


@lru_cache
def tiles(keys: int, values: int, dtype: torch.dtype) -> Tiles:
    """The one choice of tiles for a shape and type; nothing is tuned at run time."""
    width, columns = power_of_two(keys), power_of_two(values)
    step = _options(2, 1, BLOCK=min(columns, 64))
    if dtype == torch.float32:
        plain = Sweep(columns=min(columns, 32), options=_options(4, 1))
        return Tiles(
            chunk=32,
            width=width,
            prepare=_options(4, 1, BLOCK=min(width, 32)),
            output=plain,
            states=plain,
            backward=plain,
            score_gradients=_options(4, 1, COLUMNS=min(columns, 32)),
            gradients=_options(4, 1, BLOCK=min(width, 32), COLUMNS=min(columns, 32)),
            step=step,
        )
    narrow = Sweep(columns=min(columns, 64), options=_options(4, 2 if width > 128 else 3))
    wide = Sweep(columns=128, options=_options(8, 2 if width > 128 else 3))
    half = Sweep(columns=min(columns, 32), options=_options(4, 2))
    return Tiles(
        chunk=64,
        width=width,
        prepare=_options(2, 1, BLOCK=min(width, 32)),
        output=wide if columns >= 128 else narrow,
        states=narrow,
        backward=half if width > 128 else wide if columns >= 128 else narrow,
        score_gradients=_options(4, 3, COLUMNS=min(columns, 64)),
        gradients=_options(4, 3, BLOCK=min(width, 32), COLUMNS=min(columns, 64)),
        step=step,
    )


@dataclass(frozen=True)
class Plan:
    """Where the chunks, the segments and the sequences lie in the tokens."""

    chunks: Tensor  # [N, 2]: first token, number of tokens
    segments: Tensor  # [S, 4]: first chunk, number of chunks, first token, number of tokens
    runs: Tensor  # [sequences, 2]: first segment, number of segments
    n_chunks: int
    n_segments: int
    n_sequences: int
    firsts: Tensor  # [sequences]: the first segment of each sequence
    lasts: Tensor  # [sequences]: the last one

    @property
    def cut(self) -> bool:
        """Whether a sequence has more than one segment."""
        return self.n_segments > self.n_sequences


def plan(offsets: tuple[int, ...], chunk: int, programs: int, device: torch.device) -> Plan:
    """The plan for sequences between `offsets`.

    Args:
        offsets: First token of each sequence, and the number of tokens.
        chunk: Tokens of a chunk.
        programs: Programs that a sweep runs for one segment.
        device: Where the tables go.

    Returns:
        The plan. A segment is a whole sequence, unless so few programs would leave a GPU idle.
    """
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    total = sum(-(-length // chunk) for length in lengths)
    longest = max(total, 1)  # chunks of a segment
    if 4 * programs * len(lengths) < 3 * PROGRAMS:
        longest = max(8, -(-total * programs // PROGRAMS))
    chunks: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int]] = []
    for start, length in zip(offsets[:-1], lengths, strict=True):
        first = len(segments)
        for at in range(0, max(length, 1), longest * chunk):
            part = min(longest * chunk, length - at)
            segments.append((len(chunks), -(-part // chunk), start + at, part))
            chunks += [(start + at + c, min(chunk, part - c)) for c in range(0, part, chunk)]
        runs.append((first, len(segments) - first))
    tables = [torch.tensor(rows, dtype=torch.int32) for rows in (chunks, segments, runs)]
    firsts, lasts = tables[2][:, 0].long(), tables[2].sum(1) - 1
    return Plan(
        *(table.to(device) for table in tables),
        *(len(table) for table in tables),
        firsts.to(device),
        lasts.long().to(device),
    )
