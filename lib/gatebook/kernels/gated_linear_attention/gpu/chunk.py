"""What the kernels share about a chunk: its mask, running sums and decays."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(60.0)  # log2 of the decay of half a chunk, so that no factor leaves 2^±126
CLOSED = tl.constexpr(-100.0)  # a log gate below it counts as this: e^-100 is 0 beside any sum


@triton.jit
def pairs(i, j, REVERSE: tl.constexpr):
    """The mask M: whether token i sees token j."""
    return i <= j if REVERSE else i >= j


@triton.jit
def sums(x, masks_ptr, C: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr):
    """Sums over the rows up to each row, if REVERSE from it on.

    In half precision a product with M, of x in two parts with 16 bits together: tensor cores add
    faster than a scan does. `masks` holds M of both directions `[2, C, C]`.
    """
    if tl.float32 == KIND:
        return tl.cumsum(x, 0, reverse=REVERSE)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    mask = tl.load(masks_ptr + C * C * REVERSE + (i * C + j))
    high = x.to(KIND)
    low = (x - high.to(tl.float32)).to(KIND)
    return tl.dot(mask, high, tl.dot(mask, low))


@triton.jit
def load_tile(x, row, column, stride, live):
    """A tile whose first row `x` points at."""
    return tl.load(x + (row[:, None] * stride + column), mask=live, other=0.0)


@triton.jit
def log2_gates(a):
    """Log gates to base 2. A closed one, −∞ perhaps, must not cost a sum its other summands."""
    return tl.maximum(a, CLOSED, propagate_nan=tl.PropagateNan.ALL) * LOG2E


@triton.jit
def load_gates(
    x, row, column, stride, live, C: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr
):
    """A tile of log gates to base 2, of which the first row is at `x`; SHARED by all channels."""
    if SHARED:
        own = tl.load(x + row * stride, mask=tl.max(live.to(tl.int32), 1) > 0, other=0.0)
        return log2_gates(own)[:, None] + tl.zeros([C, BLOCK], tl.float32)
    return log2_gates(load_tile(x, row, column, stride, live))


@triton.jit
def decay_to_end(a_row, a_token, length, live, C: tl.constexpr, REVERSE: tl.constexpr):
    """Log gates between each token and the end of its chunk.

    Summed over the tokens after it: taken out of a sum again, a closed gate leaves its rounding.
    """
    row = tl.arange(0, C)[:, None]
    i = row - 1 if REVERSE else row + 1
    inside = live & (i >= 0) & (i < length)
    a = log2_gates(tl.load(a_row + i * a_token, mask=inside, other=0.0))
    return tl.cumsum(a, 0, reverse=not REVERSE)


@triton.jit
def next_decay(decay, a_row, a_token, j, length, live, C: tl.constexpr, REVERSE: tl.constexpr):
    """Log gates between token j and every later token, from those of the token after j.

    Summed from j outwards, so that a gate that closed before j costs no precision after it.
    """
    row = tl.arange(0, C)[:, None]
    i = j - 1 if REVERSE else j + 1
    inside = live & (i >= 0) & (i < length)
    a = log2_gates(tl.load(a_row + i * a_token, mask=inside, other=0.0))
    later = row < j if REVERSE else row > j
    return tl.where(later, decay + a, 0.0)
