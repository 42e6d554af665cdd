"""Gated linear attention on a GPU: the five kernels that `fused.py` launches.

    prepare    each chunk: Q ⊙ Λ, K ⊙ Γ, log γ and the scores P ⊙ M
    sweep      chunk after chunk: O = P X + A S, then S ← γ ⊙ S + Bᵀ X, with S in registers
    join       start states of the segments of a sequence that was cut
    score_gradients  each chunk: dP
    gradients  each chunk: dQ, dK and the closed form of d log α

`sweep` is run forward with (A, B, X) = (Q ⊙ Λ, K ⊙ Γ, V), which gives O, and backward in time with
(K ⊙ Γ, Q ⊙ Λ, dO) and Pᵀ, which gives dV: the gradient of a linear recurrence is that recurrence
the other way round.

Names follow §4.3 of the paper (arXiv 2312.06635): within a chunk of C tokens g is the running sum
of the log gates a, Λ = e^g, Γ = e^(g_C − g), γ = e^(g_C). REVERSE walks from the last token to the
first: sums of gates then run from the end of a chunk, and P is upper triangular.

Tokens of all sequences lie behind one another. `chunks` holds, for each chunk, its first token and
how many of its C rows exist; `segments`, for each segment, its first chunk, their number, its first
token and its number of tokens. What is computed here is laid out as `[chunk, head, …]`, padded
to whole blocks, so that it is read without masks. Gates are turned into powers of two at once.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(86.0)  # powers of two that a factor may reach: float32 and bfloat16 end at 127


@triton.jit
def _running(a, REVERSE: tl.constexpr):
    """Sums of log gates from the start of the chunk (if REVERSE, its end), own gate included."""
    return tl.cumsum(a, 0, reverse=REVERSE)


@triton.jit
def _middle(a, C: tl.constexpr, REVERSE: tl.constexpr):
    """The running sum in the middle of the chunk, z, and at its end, g_C."""
    row = tl.arange(0, C)[:, None]
    half = row >= C // 2 if REVERSE else row < C // 2
    return tl.sum(tl.where(half, a, 0.0), 0), tl.sum(a, 0)


@triton.jit
def _pairs(i, j, REVERSE: tl.constexpr):
    """The mask M: whether token i sees token j."""
    return i <= j if REVERSE else i >= j


@triton.jit
def _next_decay(decay, a_row, a_token, j, length, live, C: tl.constexpr, REVERSE: tl.constexpr):
    """Log gates between token j and every later token, from those of the token after j.

    Summed from j outwards, so that a gate that closed before j costs no precision after it.
    """
    row = tl.arange(0, C)[:, None]
    i = j - 1 if REVERSE else j + 1
    inside = live & (i >= 0) & (i < length)
    a = tl.load(a_row + i * a_token, mask=inside, other=0.0) * LOG2E
    later = row < j if REVERSE else row > j
    return tl.where(later, decay + a, 0.0)


@triton.jit
def _load(x, row, column, stride, live):
    """A tile whose first row `x` points at."""
    return tl.load(x + (row[:, None] * stride + column), mask=live, other=0.0)


@triton.jit
def _smooth(z, end):
    """Whether no factor e^(g − z) or e^(z − g) of this chunk can leave the range of its type."""
    return tl.max(tl.maximum(tl.abs(z), tl.abs(end - z))) <= LIMIT


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
    """P of one block of key channels before the mask, g_C, and whether the block is smooth.

    Stores Q ⊙ Λ and K ⊙ Γ.
    `k_row` and `a_row` point at the first token's keys and gates; `live` says which exist.
    """
    g = _running(a, REVERSE)
    z, end = _middle(a, C, REVERSE)
    tl.store(queries_at, (q * tl.exp2(g)).to(KIND))
    if _smooth(z, end):
        tl.store(keys_at, (k * tl.exp2(end - g)).to(KIND))
        rows, cols = (q * tl.exp2(g - z)).to(KIND), (k * tl.exp2(z - g)).to(KIND)
        p = tl.dot(rows, tl.trans(cols), input_precision=DOT)
    else:
        tl.store(keys_at, (k * tl.exp2(_running(a, not REVERSE) - a)).to(KIND))
        p = tl.zeros([C, C], tl.float32)
        decay = tl.zeros_like(q)
        for step in range(C):
            j = step if REVERSE else C - 1 - step
            decay = _next_decay(decay, a_row, a_token, j, length, live, C, REVERSE)
            k_j = tl.load(k_row + j * k_token, mask=live & (j < length), other=0.0).to(tl.float32)
            column = tl.sum(q * k_j * tl.exp2(decay), 1)
            p = tl.where(tl.arange(0, C)[None, :] == j, column[:, None], p)
    return p, end, _smooth(z, end)


@triton.jit
def prepare(
    q_ptr,
    k_ptr,
    forward_ptr,
    reverse_ptr,
    queries_ptr,
    keys_ptr,
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
    f_channel,
    r_token,
    r_head,
    r_channel,
    H,
    K,
    N,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """One chunk of one head, both directions if asked for (P is then their sum).

    Writes Q ⊙ Λ and K ⊙ Γ `[direction, N, H, C, WIDTH]`, log2 γ `[direction, N, H, WIDTH]`,
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
        q = _load(q_ptr, row, channel, q_token, live).to(tl.float32) * scale
        k = _load(k_ptr, row, channel, k_token, live).to(tl.float32)
        inside = row[:, None] * WIDTH + channel
        if FORWARD:
            a = _load(forward_ptr, row, channel * f_channel, f_token, live)
            part, end, is_smooth = _scores(
                q,
                k,
                a * LOG2E,
                k_ptr + channel,
                k_token,
                forward_ptr + channel * f_channel,
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
            p += tl.where(_pairs(row[:, None], row[None, :], False), part, 0.0)
            tl.store(total_ptr + here * WIDTH + k0 + tl.arange(0, BLOCK), end)
            forward_smooth = forward_smooth & is_smooth
        if REVERSE:
            place = there if FORWARD else here
            a = _load(reverse_ptr, row, channel * r_channel, r_token, live)
            part, end, is_smooth = _scores(
                q,
                k,
                a * LOG2E,
                k_ptr + channel,
                k_token,
                reverse_ptr + channel * r_channel,
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
            p += tl.where(_pairs(row[:, None], row[None, :], True), part, 0.0)
            tl.store(total_ptr + place * WIDTH + k0 + tl.arange(0, BLOCK), end)
            reverse_smooth = reverse_smooth & is_smooth
    tl.store(p_ptr + here * C * C + (row[:, None] * C + row[None, :]), p.to(KIND))
    if FORWARD:
        tl.store(smooth_ptr + here, forward_smooth.to(tl.int32))
    if REVERSE:
        tl.store(smooth_ptr + (there if FORWARD else here), reverse_smooth.to(tl.int32))


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
    DECAY: tl.constexpr,
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """One segment of one head and one block of value columns: Y = P X + A S, S ← γ ⊙ S + Bᵀ X.

    OUTPUT: "none"; "full"; "add" adds A S to what Y holds, without P. TRANSPOSED takes Pᵀ. STORE
    writes the state on entering each chunk, `[N, H, WIDTH, WIDE]`. START gives the state before the
    segment (else zero), DECAY writes its log2 decay. The states at both ends are float32.
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
    KIND: tl.constexpr,
    DOT: tl.constexpr,
):
    """dP = dO Vᵀ of one chunk and head, before the mask: `[N, H, C, C]`."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1)
    row, token = tl.arange(0, C), first.to(tl.int64)
    v_ptr += token * v_token + h * v_head
    do_ptr += token * do_token + h * do_head
    dp = tl.zeros([C, C], tl.float32)
    for v0 in range(0, WIDE, COLUMNS):
        column = v0 + tl.arange(0, COLUMNS)[None, :]
        live = (row < length)[:, None] & (column < V)
        v = _load(v_ptr, row, column, v_token, live)
        do = _load(do_ptr, row, column, do_token, live)
        dp = tl.dot(do, tl.trans(v), dp, input_precision=DOT)
    here = (chunk.to(tl.int64) * H + h) * C * C
    tl.store(dp_ptr + here + (row[:, None] * C + row[None, :]), dp.to(KIND))


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
    smooth_ptr,
    dq_ptr,
    dk_ptr,
    da_ptr,
    chunks_ptr,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    a_token,
    a_head,
    a_channel,
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
    here = (chunk.to(tl.int64) * H + h) * WIDTH * WIDE
    dq_far, dk_far = tl.zeros([C, BLOCK], tl.float32), tl.zeros([C, BLOCK], tl.float32)
    meeting = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, WIDE, COLUMNS):
        column = v0 + tl.arange(0, COLUMNS)
        live = alive[:, None] & (column < V)[None, :]
        v = _load(v_ptr, row, column[None, :], v_token, live)
        do = _load(do_ptr, row, column[None, :], do_token, live)
        transposed = key[None, :] * WIDE + column[:, None]
        s, ds = tl.load(states_ptr + here + transposed), tl.load(dstates_ptr + here + transposed)
        dq_far = tl.dot(do, s, dq_far, input_precision=DOT)
        dk_far = tl.dot(v, ds, dk_far, input_precision=DOT)
        meeting += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 0)
    i, j = row[:, None], row[None, :]
    dp_ptr += (chunk.to(tl.int64) * H + h) * C * C
    live, channel = alive[:, None] & (key < K)[None, :], key[None, :]
    q = _load(q_ptr, row, channel, q_token, live).to(tl.float32) * scale
    k = _load(k_ptr, row, channel, k_token, live).to(tl.float32)
    a = _load(a_ptr, row, channel * a_channel, a_token, live) * LOG2E
    at = (token * H + h) * K + (row[:, None] * (H * K) + channel)
    g = _running(a, REVERSE)
    z, end = _middle(a, C, REVERSE)
    if SMOOTH:
        rows, cols = (q * tl.exp2(g - z)).to(KIND), (k * tl.exp2(z - g)).to(KIND)
        dp = tl.load(dp_ptr + (i * C + j), mask=_pairs(i, j, REVERSE), other=0.0)
        dq = tl.dot(dp, cols, input_precision=DOT)
        dq_far *= tl.exp2(g)
        _put(dq_ptr + at, (dq * tl.exp2(g - z) + dq_far) * scale, live, ADD, KIND)
        near = rows.to(tl.float32) * dq + q * dq_far
        dp = tl.load(dp_ptr + (j * C + i), mask=_pairs(j, i, REVERSE), other=0.0)
        dk = tl.dot(dp, rows, input_precision=DOT)
        dk_far *= tl.exp2(end - g)
        _put(dk_ptr + at, dk * tl.exp2(z - g) + dk_far, live, ADD, KIND)
        near -= cols.to(tl.float32) * dk
    else:
        dq, dk, decay = tl.zeros_like(q), tl.zeros_like(q), tl.zeros_like(q)
        for step in range(C):
            n = step if REVERSE else C - 1 - step
            a_row = a_ptr + channel * a_channel
            decay = _next_decay(decay, a_row, a_token, n, length, channel < K, C, REVERSE)
            exists = (channel < K) & (n < length)
            k_n = tl.load(k_ptr + channel + n * k_token, mask=exists, other=0.0).to(tl.float32)
            dp = tl.load(dp_ptr + (i * C + n), mask=_pairs(i, n, REVERSE), other=0.0)
            column = dp.to(tl.float32) * tl.exp2(decay)
            dq += column * k_n
            dk = tl.where(i == n, tl.sum(column * q, 0)[None, :], dk)
        dq += dq_far * tl.exp2(g)
        dk_far *= tl.exp2(_running(a, not REVERSE) - a)
        _put(dq_ptr + at, dq * scale, live, ADD, KIND)
        _put(dk_ptr + at, dk + dk_far, live, ADD, KIND)
        near = q * dq - k * dk
    change = k * dk_far - near
    da = (meeting * tl.exp2(end) + tl.sum(near, 0))[None, :] + _running(change, REVERSE) - change
    tl.store(da_ptr + at, da, mask=live)


@triton.jit
def step(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    state_ptr,
    o_ptr,
    after_ptr,
    scale,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    a_batch,
    a_head,
    a_channel,
    H,
    K,
    V,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    START: tl.constexpr,
    KIND: tl.constexpr,
):
    """One token: S_t = Diag(α_t) S_{t-1} + k_tᵀ v_t and o_t = s q_t S_t (§4.1), in float32."""
    v0, b, h = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64), tl.program_id(2)
    key, column = tl.arange(0, WIDTH), v0 + tl.arange(0, BLOCK)
    is_key, is_column = key < K, column < V
    q = tl.load(q_ptr + b * q_batch + h * q_head + key, mask=is_key, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * k_batch + h * k_head + key, mask=is_key, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + b * a_batch + h * a_head + key * a_channel, mask=is_key, other=0.0)
    v = tl.load(v_ptr + b * v_batch + h * v_head + column, mask=is_column, other=0.0)
    at = ((b * H + h) * K + key[:, None]) * V + column[None, :]
    live = is_key[:, None] & is_column[None, :]
    s = k[:, None] * v.to(tl.float32)[None, :]
    if START:
        s += tl.exp2(a * LOG2E)[:, None] * tl.load(state_ptr + at, mask=live, other=0.0)
    tl.store(after_ptr + at, s, mask=live)
    o = tl.sum(q[:, None] * s, 0) * scale
    tl.store(o_ptr + (b * H + h) * V + column, o.to(KIND), mask=is_column)
