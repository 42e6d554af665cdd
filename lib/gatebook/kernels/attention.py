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
    scale: float | None = None,
) -> Tensor:
    """Softmax attention through `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, S, G, K]`; G divides H, and query head i reads key head ⌊i G / H⌋.
        v: Values `[B, S, G, V]`.
        causal: Whether query t sees keys 0..past + t only; needs S = past + T.
        past: Number of keys before that of the first query.
        scale: Factor on the scores; `K ** -0.5` when None.

    Returns:
        The output `[B, T, H, V]`.

    Raises:
        ValueError: `causal` with S other than past + T, or heads that do not divide.
    """
    _check(q, k, causal, past)
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
    scale: float | None = None,
) -> Tensor:
    """The same operator from its equation, softmax(s q kᵀ) v; exact in float64.

    Args, Returns and Raises as `softmax_attention`.
    """
    _check(q, k, causal, past)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    if causal:
        scores = scores.masked_fill(~_seen(q.shape[1], past, q.device), float("-inf"))
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def _seen(length: int, past: int, device: torch.device) -> Tensor:
    """Which keys a query sees, `[T, P + T]`."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _check(q: Tensor, k: Tensor, causal: bool, past: int) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if causal and past + q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many keys as queries and keys before them; got "
            f"{k.shape[1]} keys, {q.shape[1]} queries and past={past}"
        )
