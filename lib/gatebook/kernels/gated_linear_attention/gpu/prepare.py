"""Each chunk by itself: decayed queries and keys, and the scores within the chunk (§4.3)."""

import triton
import triton.language as tl

from gatebook.kernels.gated_linear_attention.gpu.chunk import (
    LIMIT,
    decay_to_end,
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
        to_end = decay_to_end(a_row, a_token, length, live, C, REVERSE)
        tl.store(keys_at, (k * tl.exp2(to_end)).to(KIND))
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
def _one_way(
    p,
    q_ptr,
    k_ptr,
    a_ptr,
    queries_ptr,
    keys_ptr,
    middle_ptr,
    total_ptr,
    smooth_ptr,
    place,
    length,
    scale,
    q_token,
    k_token,
    a_token,
    K,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """One direction, block after block of key channels: stores all but P, which it adds to `p`."""
    row = tl.arange(0, C)
    all_smooth = length > 0
    for k0 in tl.range(0, WIDTH, BLOCK, num_stages=2):  # loads the next block ahead
        channel = k0 + tl.arange(0, BLOCK)[None, :]
        live = (row < length)[:, None] & (channel < K)
        part, z, end, smooth = _scores(
            load_tile(q_ptr, row, channel, q_token, live).to(tl.float32) * scale,
            load_tile(k_ptr, row, channel, k_token, live).to(tl.float32),
            load_gates(a_ptr, row, channel, a_token, live, C, BLOCK, SHARED),
            k_ptr + channel,
            k_token,
            a_ptr + channel * (1 - SHARED),
            a_token,
            queries_ptr + place * C * WIDTH + (row[:, None] * WIDTH + channel),
            keys_ptr + place * C * WIDTH + (row[:, None] * WIDTH + channel),
            length,
            channel < K,
            C,
            KIND,
            REVERSE,
            DOT,
        )
        p += tl.where(pairs(row[:, None], row[None, :], REVERSE), part, 0.0)
        tl.store(middle_ptr + place * WIDTH + k0 + tl.arange(0, BLOCK), z)
        tl.store(total_ptr + place * WIDTH + k0 + tl.arange(0, BLOCK), end)
        all_smooth = all_smooth & smooth
    tl.store(smooth_ptr + place, all_smooth.to(tl.int32))
    return p


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
    row, token = tl.arange(0, C), first.to(tl.int64)
    q_ptr += token * q_token + h * q_head
    k_ptr += token * k_token + h * k_head
    here = chunk.to(tl.int64) * H + h
    p = tl.zeros([C, C], tl.float32)
    if FORWARD:
        p = _one_way(
            p,
            q_ptr,
            k_ptr,
            forward_ptr + token * f_token + h * f_head,
            queries_ptr,
            keys_ptr,
            middle_ptr,
            total_ptr,
            smooth_ptr,
            here,
            length,
            scale,
            q_token,
            k_token,
            f_token,
            K,
            C,
            WIDTH,
            BLOCK,
            FORWARD_SHARED,
            False,
            KIND,
            DOT,
        )
    if REVERSE:
        p = _one_way(
            p,
            q_ptr,
            k_ptr,
            reverse_ptr + token * r_token + h * r_head,
            queries_ptr,
            keys_ptr,
            middle_ptr,
            total_ptr,
            smooth_ptr,
            here + (N * H if FORWARD else 0),  # the second direction lies behind the first
            length,
            scale,
            q_token,
            k_token,
            r_token,
            K,
            C,
            WIDTH,
            BLOCK,
            REVERSE_SHARED,
            True,
            KIND,
            DOT,
        )
    tl.store(p_ptr + here * C * C + (row[:, None] * C + row[None, :]), p.to(KIND))
