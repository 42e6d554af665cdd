"""Softmax attention: torch's fused kernel, and the equation written out as its oracle.

Shapes: B batch, T queries, S keys, H heads, K key channels, V value channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention through `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, S, H, K]`.
        v: Values `[B, S, H, V]`.
        causal: Whether query t sees keys 0..t only; needs T = S.
        scale: Factor on the scores; `K ** -0.5` when None.

    Returns:
        The output `[B, T, H, V]`.

    Raises:
        ValueError: `causal` with T different from S, where "up to t" has two readings.
    """
    _check_causal(q, k, causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def naive_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """The same operator from its equation, softmax(s q kᵀ) v; exact in float64.

    Args, Returns and Raises as `softmax_attention`.
    """
    _check_causal(q, k, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def _check_causal(q: Tensor, k: Tensor, causal: bool) -> None:
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many keys as queries; got {k.shape[1]} and {q.shape[1]}"
        )
