"""Softmax attention: torch's fused kernel, and the equation written out as its oracle.

Shapes: B batch, T queries, S keys, H query heads, G key and value heads, K key channels, V value
channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    past: int = 0,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention through `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, S, G, K]`; G divides H, and query head i reads key head ⌊i G / H⌋.
        v: Values `[B, S, G, V]`.
        causal: Whether query t sees keys 0..past + t only; needs S = past + T.
        past: Number of keys before that of the first query.
        window: Keys that a causal query sees, its own among them: keys past + t − window + 1 to
            past + t; 0 for all.
        scale: Factor on the scores; `K ** -0.5` when None.

    Returns:
        The output `[B, T, H, V]`.

    Raises:
        ValueError: `causal` with S other than past + T, a negative window or one without `causal`,
            or heads that do not divide.
    """
    _check(q, k, causal, past, window)
    if 0 < window < k.shape[1]:
        return _windowed(q, k, v, past, window, scale)
    length, grouped = q.shape[1], q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T or S, D)
    mask = None if past == 0 or length == 1 or not causal else _seen(length, past, q.device)
    o = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and past == 0,
        scale=scale,
        enable_gqa=grouped,
    )
    return o.transpose(1, 2)


def naive_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    past: int = 0,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """The same operator from its equation, softmax(s q kᵀ) v; exact in float64.

    Args, Returns and Raises as `softmax_attention`.
    """
    _check(q, k, causal, past, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    if causal:
        scores = scores.masked_fill(~_seen(q.shape[1], past, q.device, window), float("-inf"))
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, past: int, window: int, scale: float | None
) -> Tensor:
    """Causal attention to the last `window` keys: one masked call, or, where that would compute
    several times what is needed, one for blocks of `window` queries with twice as many keys."""
    batch, length, repeats = *q.shape[:2], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    if past or length < 4 * window:
        seen = _seen(length, past, q.device, window)
        return _masked(q, k, v, seen, scale)
    fill = -length % window
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)) for x in (q, k, v))
    k, v = (F.pad(x, (0, 0, 0, 0, window, 0)) for x in (k, v))
    blocks = q.shape[1] // window
    q = q.reshape(batch * blocks, window, *q.shape[2:])
    k, v = (_with_the_block_before(x, window) for x in (k, v))  # (B blocks, 2 window, H, D)
    seen = _seen(window, window, q.device, window).repeat(blocks, 1, 1)
    seen[0, :, :window] = False  # before the first token
    o = _masked(q, k, v, seen.repeat(batch, 1, 1).unsqueeze(1), scale)
    return o.reshape(batch, -1, *o.shape[2:])[:, :length]


def _with_the_block_before(x: Tensor, size: int) -> Tensor:
    """Blocks of `size` rows, each after the one before it: `[B, (n + 1) size, H, D]` to
    `[B n, 2 size, H, D]`."""
    return x.unfold(1, 2 * size, size).permute(0, 1, 4, 2, 3).flatten(0, 1)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)


def _seen(length: int, past: int, device: torch.device, window: int = 0) -> Tensor:
    """Which keys a query sees, `[T, P + T]`."""
    seen = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return seen.triu(past - window + 1) if window else seen


def _check(q: Tensor, k: Tensor, causal: bool, past: int, window: int) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if window < 0 or (window and not causal):
        raise ValueError(f"window is at least 0 and needs causal=True; got {window} and {causal}")
    if causal and past + q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many keys as queries and keys before them; got "
            f"{k.shape[1]} keys, {q.shape[1]} queries and past={past}"
        )
