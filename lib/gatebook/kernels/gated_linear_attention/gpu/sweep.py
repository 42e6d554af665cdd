"""Chunk after chunk: the outputs and the states, forward and backward in time (§4.3).

The gradient of a linear recurrence is that recurrence the other way round, so `sweep` serves both:
with (A, B, X) = (Q ⊙ Λ, K ⊙ Γ, V) it gives O; backward with (K ⊙ Γ, Q ⊙ Λ, dO) and Pᵀ, dV.
"""

import triton
import triton.language as tl


@triton.jit
def sweep(
    a_ptr,
    b_ptr,
    total_ptr,
    p_ptr,
    x_ptr,
    y_ptr,
    states_ptr,
    start_ptr,
    end_ptr,
    decay_ptr,
    segments_ptr,
    x_token,
    x_head,
    y_token,
    y_head,
    H,
    V,
    WIDE,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCENDING: tl.constexpr,
    OUTPUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STORE: tl.constexpr,
    START: tl.constexpr,
    END: tl.constexpr,
    DECAY: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """One segment of one head and one block of value columns: Y = P X + A S, S ← γ ⊙ S + Bᵀ X.

    OUTPUT: "none"; "full"; "add" adds A S to what Y holds, without P. TRANSPOSED takes Pᵀ. STORE
    writes the state on entering each chunk, `[N, H, WIDTH, WIDE]`. START gives the state before the
    segment (else zero), END writes that after it, both float32; DECAY its log2 decay.
    """
    v0, segment, h = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    first_chunk = tl.load(segments_ptr + 4 * segment)
    count = tl.load(segments_ptr + 4 * segment + 1)
    first = tl.load(segments_ptr + 4 * segment + 2).to(tl.int64)
    length = tl.load(segments_ptr + 4 * segment + 3)
    row, key, column = tl.arange(0, C), tl.arange(0, WIDTH), v0 + tl.arange(0, BLOCK)
    state = key[None, :] * WIDE + column[:, None]
    ends = (segment.to(tl.int64) * H + h) * WIDTH * WIDE + state
    s = tl.zeros([BLOCK, WIDTH], tl.float32)  # transposed, so that it stays in registers
    if START:
        s = tl.load(start_ptr + ends)
    log_decay = tl.zeros([WIDTH], tl.float32)
    for i in range(count):
        n = count - 1 - i if DESCENDING else i
        here = (first_chunk + n).to(tl.int64) * H + h
        token = first + n * C
        live = (n * C + row < length)[None, :] & (column < V)[:, None]
        x_at = x_ptr + token * x_token + h * x_head
        x = tl.load(x_at + (row[None, :] * x_token + column[:, None]), mask=live, other=0.0)
        if STORE:
            tl.store(states_ptr + here * WIDTH * WIDE + state, s.to(KIND))
        if OUTPUT != "none":
            a = tl.load(a_ptr + here * C * WIDTH + (row[None, :] * WIDTH + key[:, None]))
            y = tl.dot(s.to(KIND), a, input_precision=DOT)
            y_at = y_ptr + token * y_token + h * y_head
            y_at += row[None, :] * y_token + column[:, None]
            if OUTPUT == "full":
                if TRANSPOSED:
                    p = tl.load(p_ptr + here * C * C + (row[:, None] * C + row[None, :]))
                else:
                    p = tl.load(p_ptr + here * C * C + (row[None, :] * C + row[:, None]))
                y = tl.dot(x, p, y, input_precision=DOT)
            else:
                y += tl.load(y_at, mask=live, other=0.0).to(tl.float32)
            tl.store(y_at, y.to(KIND), mask=live)
        b = tl.load(b_ptr + here * C * WIDTH + (row[:, None] * WIDTH + key[None, :]))
        total = tl.load(total_ptr + here * WIDTH + key)
        s = tl.dot(x, b, s * tl.exp2(total)[None, :], input_precision=DOT)
        if DECAY:
            log_decay += total
    if END:
        tl.store(end_ptr + ends, s)
    if DECAY and v0 == 0:
        tl.store(decay_ptr + (segment * H + h) * WIDTH + key, log_decay)


@triton.jit
def join(
    local_ptr,
    decay_ptr,
    start_ptr,
    runs_ptr,
    H,
    WIDE,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCENDING: tl.constexpr,
    START: tl.constexpr,
):
    """Replaces each segment's own state by the state that it starts from, sequence by sequence.

    `runs` holds the first segment and the number of segments of each sequence.
    """
    v0, sequence, h = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    first, count = tl.load(runs_ptr + 2 * sequence), tl.load(runs_ptr + 2 * sequence + 1)
    key = tl.arange(0, WIDTH)
    state = key[:, None] * WIDE + (v0 + tl.arange(0, BLOCK))[None, :]
    s = tl.zeros([WIDTH, BLOCK], tl.float32)
    if START:
        s = tl.load(start_ptr + (sequence.to(tl.int64) * H + h) * WIDTH * WIDE + state)
    for i in range(count):
        segment = first + (count - 1 - i if DESCENDING else i)
        here = segment.to(tl.int64) * H + h
        own = tl.load(local_ptr + here * WIDTH * WIDE + state)
        decay = tl.exp2(tl.load(decay_ptr + here * WIDTH + key))
        tl.store(local_ptr + here * WIDTH * WIDE + state, s)
        s = s * decay[:, None] + own
