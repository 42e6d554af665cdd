"""Each chunk by itself: decayed queries and keys, and the scores within the chunk (§4.3)."""

import triton
import triton.language as tl

from gatebook.kernels.gated_linear_attention.gpu.chunk import (
    LIMIT,
    load_gates,
    load_tile,
    next_decay,
    pairs,
)


@triton.jit
def _scores(
    q,
    k,
    a,
    k_row,
    k_token,
    a_row,
    a_token,
    queries_at,
    keys_at,
    length,
    live,
    C: tl.constexpr,
    KIND: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
):
    """P of one block of key channels before the mask; z, g in the middle of the chunk; g_C.

    Also whether the block is smooth: P is then one product (Q ⊙ e^(g − z)) (K ⊙ e^(z − g))ᵀ, else
    summed entry by entry. Stores Q ⊙ Λ and K ⊙ Γ.
    `k_row` and `a_row` point at the first token's keys and gates; `live` says which exist.
    """
    row = tl.arange(0, C)[:, None]
    g = tl.cumsum(a, 0, reverse=REVERSE)
    z = tl.sum(tl.where(row >= C // 2 if REVERSE else row < C // 2, a, 0.0), 0)
    end = tl.sum(a, 0)
    smooth = tl.max(tl.maximum(tl.abs(z), tl.abs(end - z))) <= LIMIT
    queries = q * tl.exp2(g)
    tl.store(queries_at, queries.to(KIND))
    if smooth:
        keys = k * tl.exp2(end - g)
        tl.store(keys_at, keys.to(KIND))
        rows, cols = (queries * tl.exp2(-z)).to(KIND), (keys * tl.exp2(z - end)).to(KIND)
        p = tl.dot(rows, tl.trans(cols), input_precision=DOT)
    else:
        tl.store(keys_at, (k * tl.exp2(tl.cumsum(a, 0, reverse=not REVERSE) - a)).to(KIND))
        p = tl.zeros([C, C], tl.float32)
        decay = tl.zeros_like(q)
        for step in range(C):
            j = step if REVERSE else C - 1 - step
            decay = next_decay(decay, a_row, a_token, j, length, live, C, REVERSE)
            k_j = tl.load(k_row + j * k_token, mask=live & (j < length), other=0.0).to(tl.float32)
            column = tl.sum(q * k_j * tl.exp2(decay), 1)
            p = tl.where(tl.arange(0, C)[None, :] == j, column[:, None], p)
    return p, z, end, smooth


@triton.jit
def prepare(
    q_ptr,
    k_ptr,
    forward_ptr,
    reverse_ptr,
    queries_ptr,
    keys_ptr,
    middle_ptr,
    total_ptr,
    smooth_ptr,
    p_ptr,
    chunks_ptr,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    f_token,
    f_head,
    r_token,
    r_head,
    H,
    K,
    N,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FORWARD_SHARED: tl.constexpr,
    REVERSE_SHARED: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """One chunk of one head, both directions if asked for (P is then their sum).

    Writes Q ⊙ Λ and K ⊙ Γ `[direction, N, H, C, WIDTH]`, z and g_C `[direction, N, H, WIDTH]`,
    whether all channels are smooth `[direction, N, H]`, and P `[N, H, C, C]`. The factor on the
    scores is applied to q.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    row = tl.arange(0, C)
    token = first.to(tl.int64)
    q_ptr += token * q_token + h * q_head
    k_ptr += token * k_token + h * k_head
    forward_ptr += token * f_token + h * f_head
    reverse_ptr += token * r_token + h * r_head
    here = chunk.to(tl.int64) * H + h
    there = (chunk.to(tl.int64) + N) * H + h  # the same place of the second direction
    p = tl.zeros([C, C], tl.float32)
    forward_smooth, reverse_smooth = length > 0, length > 0
    for k0 in tl.static_range(0, WIDTH, BLOCK):
        channel = k0 + tl.arange(0, BLOCK)[None, :]
        live = (row < length)[:, None] & (channel < K)
        q = load_tile(q_ptr, row, channel, q_token, live).to(tl.float32) * scale
        k = load_tile(k_ptr, row, channel, k_token, live).to(tl.float32)
        inside = row[:, None] * WIDTH + channel
        if FORWARD:
            a = load_gates(forward_ptr, row, channel, f_token, live, C, BLOCK, FORWARD_SHARED)
            part, z, end, smooth = _scores(
                q,
                k,
                a,
                k_ptr + channel,
                k_token,
                forward_ptr + channel * (1 - FORWARD_SHARED),
                f_token,
                queries_ptr + here * C * WIDTH + inside,
                keys_ptr + here * C * WIDTH + inside,
                length,
                channel < K,
                C,
                KIND,
                False,
                DOT,
            )
            p += tl.where(pairs(row[:, None], row[None, :], False), part, 0.0)
            tl.store(middle_ptr + here * WIDTH + k0 + tl.arange(0, BLOCK), z)
            tl.store(total_ptr + here * WIDTH + k0 + tl.arange(0, BLOCK), end)
            forward_smooth = forward_smooth & smooth
        if REVERSE:
            place = there if FORWARD else here
            a = load_gates(reverse_ptr, row, channel, r_token, live, C, BLOCK, REVERSE_SHARED)
            part, z, end, smooth = _scores(
                q,
                k,
                a,
                k_ptr + channel,
                k_token,
                reverse_ptr + channel * (1 - REVERSE_SHARED),
                r_token,
                queries_ptr + place * C * WIDTH + inside,
                keys_ptr + place * C * WIDTH + inside,
                length,
                channel < K,
                C,
                KIND,
                True,
                DOT,
            )
            p += tl.where(pairs(row[:, None], row[None, :], True), part, 0.0)
            tl.store(middle_ptr + place * WIDTH + k0 + tl.arange(0, BLOCK), z)
            tl.store(total_ptr + place * WIDTH + k0 + tl.arange(0, BLOCK), end)
            reverse_smooth = reverse_smooth & smooth
    tl.store(p_ptr + here * C * C + (row[:, None] * C + row[None, :]), p.to(KIND))
    if FORWARD:
        tl.store(smooth_ptr + here, forward_smooth.to(tl.int32))
    if REVERSE:
        tl.store(smooth_ptr + (there if FORWARD else here), reverse_smooth.to(tl.int32))
