"""One token of decoding."""

import triton
import triton.language as tl

from gatebook.kernels.gated_linear_attention.gpu.chunk import LOG2E


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
