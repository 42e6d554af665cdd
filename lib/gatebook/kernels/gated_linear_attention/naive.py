"""Gated linear attention from the papers' equations.

Causal: Yang et al. 2023, arXiv 2312.06635. Bidirectional: Liao et al. 2024, arXiv 2405.18425.
These forms are for reading, for testing and for showing what goes wrong; they are slow.
Shapes: B batch, T tokens, H heads, K key channels, V value channels; gates g = log α ≤ 0.
"""

import torch
from torch import Tensor


def naive_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of §4.1: S_t = Diag(α_t) S_{t-1} + k_tᵀ v_t and o_t = s q_t S_t.

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, T, H, K]`.
        v: Values `[B, T, H, V]`.
        g: Natural-log gates `[B, T, H, K]`.
        scale: The factor s on the output.
        state: The state before the first token, S_0 `[B, H, K, V]`.

    Returns:
        The outputs `[B, T, H, V]` and the last state `[B, H, K, V]`.
    """
    outputs = []
    for t in range(q.shape[1]):
        update = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)  # (B, H, K, V)
        state = g[:, t].exp().unsqueeze(-1) * state + update
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].to(state.dtype), state))
    return torch.stack(outputs, 1), state


def parallel_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The parallel form of §4.2, stable: P_ij = s Σ_c q_ic k_jc exp(log b_ic − log b_jc), i ≥ j.

    Every exponent that is kept is a sum of log-gates, so none is positive. Memory grows as T² K.
    Arguments and results as `naive_gla`.
    """
    b = g.cumsum(1)
    p = scale * torch.einsum("bihk,bjhk,bijhk->bhij", q, k, _decay(b))
    from_state = scale * torch.einsum("bthk,bhkv->bthv", q * b.exp(), state)
    last = torch.einsum("bthk,bthv->bhkv", k * (b[:, -1:] - b).exp(), v)
    return (
        torch.einsum("bhij,bjhv->bihv", p, v) + from_state,
        b[:, -1].exp().unsqueeze(-1) * state + last,
    )


def _decay(b: Tensor) -> Tensor:
    """exp(b_i − b_j) for i ≥ j, else 0: `[B, T, H, K]` to `[B, T, T, H, K]`."""
    future = torch.ones(b.shape[1], b.shape[1], dtype=torch.bool, device=b.device).triu(1)
    return (b.unsqueeze(2) - b.unsqueeze(1)).masked_fill(future[..., None, None], -torch.inf).exp()


def factorised_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The parallel form exactly as printed in §4.2: O = s (((Q ⊙ B)(K / B)ᵀ) ⊙ M) V.

    1 / B grows without bound: with gates that halve the memory every 16 tokens float32 overflows
    at T = 2048, and the outputs turn to NaN. Kept to show that. Arguments and results as
    `naive_gla`, right only while B does not underflow.
    """
    b = g.cumsum(1).exp()
    p = scale * torch.einsum("bihk,bjhk->bhij", q * b, k / b)
    from_state = scale * torch.einsum("bthk,bhkv->bthv", q * b, state)
    last = torch.einsum("bthk,bthv->bhkv", k / b, v)
    return (
        torch.einsum("bhij,bjhv->bihv", p.tril(), v) + from_state,
        b[:, -1].unsqueeze(-1) * (state + last),
    )


def parallel_bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, scale: float
) -> Tensor:
    """Both directions as one matrix, o = A v (ViG), with b_t = Σ_{s ≤ t} log α→_s from the front
    and c_t = Σ_{s ≥ t} log α←_s from the back:

    A_ij = s/2 Σ_c q_ic k_jc ([j ≤ i] exp(b_ic − b_jc) + [j ≥ i] exp(c_ic − c_jc)).

    Args:
        q: Queries `[B, T, H, K]`.
        k: Keys `[B, T, H, K]`.
        v: Values `[B, T, H, V]`.
        g_forward: Natural-log gates log α→ `[B, T, H, K]`.
        g_backward: Natural-log gates log α← `[B, T, H, K]`.
        scale: The factor s on the output.

    Returns:
        The outputs `[B, T, H, V]`.
    """
    from_left = _decay(g_forward.cumsum(1))
    from_right = _decay(g_backward.flip(1).cumsum(1)).flip(1, 2)
    a = scale / 2 * torch.einsum("bihk,bjhk,bijhk->bhij", q, k, from_left + from_right)
    return torch.einsum("bhij,bjhv->bihv", a, v)
