"""Each chunk by itself: the gradients of the scores, queries, keys and gates (§4.4)."""

import triton
import triton.language as tl

from gatebook.kernels.gated_linear_attention.gpu.chunk import (
    decay_to_end,
    load_gates,
    load_tile,
    next_decay,
    pairs,
    sums,
)


@triton.jit
def _put(at, x, live, ADD: tl.constexpr, KIND: tl.constexpr):
    if ADD:
        x += tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, x.to(KIND), mask=live)


@triton.jit
def score_gradients(
    v_ptr,
    do_ptr,
    dp_ptr,
    chunks_ptr,
    v_token,
    v_head,
    do_token,
    do_head,
    H,
    V,
    WIDE,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """dP = dO Vᵀ ⊙ M of one chunk and head, `[N, H, C, C]`."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    row, token = tl.arange(0, C), first.to(tl.int64)
    v_ptr += token * v_token + h * v_head
    do_ptr += token * do_token + h * do_head
    dp = tl.zeros([C, C], tl.float32)
    for v0 in range(0, WIDE, COLUMNS):
        column = v0 + tl.arange(0, COLUMNS)[None, :]
        live = (row < length)[:, None] & (column < V)
        v = load_tile(v_ptr, row, column, v_token, live)
        do = load_tile(do_ptr, row, column, do_token, live)
        dp = tl.dot(do, tl.trans(v), dp, input_precision=DOT)
    i, j = row[:, None], row[None, :]
    dp_ptr += (chunk.to(tl.int64) * H + h) * C * C
    tl.store(dp_ptr + (i * C + j), tl.where(pairs(i, j, REVERSE), dp, 0.0).to(KIND))


@triton.jit
def gradients(
    q_ptr,
    k_ptr,
    a_ptr,
    v_ptr,
    do_ptr,
    states_ptr,
    dstates_ptr,
    dp_ptr,
    middle_ptr,
    total_ptr,
    smooth_ptr,
    dq_ptr,
    dk_ptr,
    da_ptr,
    chunks_ptr,
    masks_ptr,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    a_token,
    a_head,
    v_token,
    v_head,
    do_token,
    do_head,
    H,
    K,
    V,
    WIDE,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMOOTH: tl.constexpr,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """dQ, dK and d log α of one chunk, one head and one block of key channels.

    Launched twice: with SMOOTH for the smooth chunks, then without for the others, which need more
    registers and would slow all down.

    With B = k ⊙ dk from the states and A = q ⊙ dq − k ⊙ dk of the rest,
    d log α_t = Σ_{i ≥ t} A_i + Σ_{i < t} B_i + γ ⊙ (S ⊙ dS) 1: §4.4 with the chunk's last state
    written out. What is left to cancel in A, tokens that see only each other, cancels exactly,
    because both products are formed from the same rounded factors.
    """
    k0, chunk, h = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    if tl.load(smooth_ptr + chunk * H + h) != SMOOTH:
        return
    first, length = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    row, key = tl.arange(0, C), k0 + tl.arange(0, BLOCK)
    token = first.to(tl.int64)
    q_ptr += token * q_token + h * q_head
    k_ptr += token * k_token + h * k_head
    a_ptr += token * a_token + h * a_head
    v_ptr += token * v_token + h * v_head
    do_ptr += token * do_token + h * do_head
    alive = row < length
    place = chunk.to(tl.int64) * H + h
    states_ptr += place * WIDTH * WIDE
    dstates_ptr += place * WIDTH * WIDE
    live, channel = alive[:, None] & (key < K)[None, :], key[None, :]
    q = load_tile(q_ptr, row, channel, q_token, live)  # now, so that they arrive during the loop
    k = load_tile(k_ptr, row, channel, k_token, live)
    a = load_gates(a_ptr, row, channel, a_token, live, C, BLOCK, False)
    dq_far, dk_far = tl.zeros([C, BLOCK], tl.float32), tl.zeros([C, BLOCK], tl.float32)
    meeting = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for v0 in range(0, WIDE, COLUMNS):
        column = v0 + tl.arange(0, COLUMNS)
        is_value = alive[:, None] & (column < V)[None, :]
        v = load_tile(v_ptr, row, column[None, :], v_token, is_value)
        do = load_tile(do_ptr, row, column[None, :], do_token, is_value)
        transposed = key[None, :] * WIDE + column[:, None]
        s, ds = tl.load(states_ptr + transposed), tl.load(dstates_ptr + transposed)
        dq_far = tl.dot(do, s, dq_far, input_precision=DOT)
        dk_far = tl.dot(v, ds, dk_far, input_precision=DOT)
        meeting += s.to(tl.float32) * ds.to(tl.float32)
    i, j = row[:, None], row[None, :]
    dp_ptr += place * C * C
    q, k = q.to(tl.float32) * scale, k.to(tl.float32)
    at = (token * H + h) * K + (row[:, None] * (H * K) + channel)
    g = sums(a, masks_ptr, C, REVERSE, KIND)
    end = tl.load(total_ptr + place * WIDTH + key)
    to_start = tl.exp2(g)
    dq_far *= to_start
    if SMOOTH:
        z = tl.load(middle_ptr + place * WIDTH + key)
        to_end, to_z, from_z = tl.exp2(end - g), tl.exp2(-z), tl.exp2(z - end)
        rows, cols = (q * (to_start * to_z)).to(KIND), (k * (to_end * from_z)).to(KIND)
        dp = tl.load(dp_ptr + (i * C + j))
        dq = tl.dot(dp, cols, input_precision=DOT)
        _put(dq_ptr + at, (dq * (to_start * to_z) + dq_far) * scale, live, ADD, KIND)
        near = rows.to(tl.float32) * dq + q * dq_far
        dp = tl.load(dp_ptr + (j * C + i))
        dk = tl.dot(dp, rows, input_precision=DOT)
        dk_far *= to_end
        _put(dk_ptr + at, dk * (to_end * from_z) + dk_far, live, ADD, KIND)
        near -= cols.to(tl.float32) * dk
    else:
        dq, dk, decay = tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q)
        for step in range(C):
            n = step if REVERSE else C - 1 - step
            decay = next_decay(decay, a_ptr + channel, a_token, n, length, channel < K, C, REVERSE)
            exists = (channel < K) & (n < length)
            k_n = tl.load(k_ptr + channel + n * k_token, mask=exists, other=0.0).to(tl.float32)
            dp = tl.load(dp_ptr + (i * C + n))
            column = dp.to(tl.float32) * tl.exp2(decay)
            dq += column * k_n
            dk = tl.where(i == n, tl.sum(column * q, 0)[None, :], dk)
        dq += dq_far
        to_end = decay_to_end(a_ptr + channel, a_token, length, channel < K, C, REVERSE)
        dk_far *= tl.exp2(to_end)
        _put(dq_ptr + at, dq * scale, live, ADD, KIND)
        _put(dk_ptr + at, dk + dk_far, live, ADD, KIND)
        near = q * dq - k * dk
    change = k * dk_far - near
    da = sums(change, masks_ptr, C, REVERSE, KIND) - change
    da += (tl.sum(meeting, 0) * tl.exp2(end) + tl.sum(near, 0))[None, :]
    tl.store(da_ptr + at, da, mask=live)
