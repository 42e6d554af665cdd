"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): one operator, several forms."""

import contextlib

import torch
from torch import Tensor

from gatebook.kernels.gated_linear_attention.chunked import chunked_gla
from gatebook.kernels.gated_linear_attention.naive import (
    factorised_gla,
    naive_gla,
    parallel_gla,
)

__all__ = ["BACKENDS", "gla"]

BACKENDS = ("auto", "naive", "parallel", "factorised", "chunked")
_PLAIN = {"naive": naive_gla, "parallel": parallel_gla, "factorised": factorised_gla}


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    chunk_size: int = 64,
    subchunk: int = 16,
) -> tuple[Tensor, Tensor | None]:
    """Causal gated linear attention: S_t = Diag(α_t) S_{t-1} + k_tᵀ v_t, o_t = s q_t S_t.

    Equation numbers follow version 6 of the paper: the recurrence is §4.1, the parallel form §4.2,
    the chunkwise form §4.3. All backends are differentiable in q, k, v, g and `initial_state`.

    Args:
        q: Queries `[B, T, H, K]`, any floating type.
        k: Keys `[B, T, H, K]`, of the same type.
        v: Values `[B, T, H, V]`, of the same type; V may differ from K.
        g: Natural-log gates log α `[B, T, H, K]` or, one per head, `[B, T, H, 1]`. Float32, or
            float64 when q is float64. Not positive for a memory that decays; not checked.
        scale: The factor s; `K ** -0.5` when None (as in the released code; the text has none).
        initial_state: S_0 `[B, H, K, V]` in the type of g; zeros when None.
        output_final_state: Whether to return S_T as well.
        backend: "naive" (token by token), "parallel" (T × T, memory T² K), "factorised" (T × T as
            printed in §4.2, which overflows), "chunked" (chunk by chunk with secondary chunking;
            the fast one) or "auto", which takes "chunked".
        chunk_size: The paper's C for "chunked", rounded up to a multiple of the sub-chunk.
        subchunk: The paper's c for "chunked", a power of two.

    Returns:
        The outputs `[B, T, H, V]` in the type of v, and S_T `[B, H, K, V]` in the type of g, or
        None unless `output_final_state`.

    Raises:
        ValueError: A shape, type, backend or block length that is not allowed; it says what is.
    """
    _check(q, k, v, g, initial_state, backend, chunk_size, subchunk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = g.expand(k.shape)
    if initial_state is None:
        initial_state = g.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    with _full_precision(q.device.type):
        if backend in _PLAIN:
            args = (x.to(g.dtype) for x in (q, k, v))
            o, state = _PLAIN[backend](*args, g, scale, initial_state)
        else:
            o, state = chunked_gla(q, k, v, g, scale, initial_state, chunk_size, subchunk)
    return o.to(v.dtype), state if output_final_state else None


def _full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Keeps autocast out: the operator itself decides what runs in low precision."""
    if torch.amp.is_autocast_available(device_type):  # the meta device has none
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    backend: str,
    chunk_size: int,
    subchunk: int,
) -> None:
    if q.ndim != 4 or 0 in q.shape or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k need one shape [B, T, H, K] and v [B, T, H, V], none of them empty; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if g.shape not in (q.shape, (*q.shape[:3], 1)):
        raise ValueError(
            f"g needs the shape of k, {list(k.shape)}, or {[*k.shape[:3], 1]}; got {list(g.shape)}"
        )
    wanted = torch.promote_types(q.dtype, torch.float32)
    if not (q.dtype == k.dtype == v.dtype and g.dtype == wanted):
        raise ValueError(
            "q, k and v need one floating type, and g float32 (float64 with float64 q); got "
            f"{q.dtype}, {k.dtype}, {v.dtype} and {g.dtype}"
        )
    state_shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and (
        initial_state.shape != state_shape or initial_state.dtype != g.dtype
    ):
        raise ValueError(
            f"initial_state needs the shape {list(state_shape)} and type {g.dtype}; got "
            f"{list(initial_state.shape)} and {initial_state.dtype}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if chunk_size < 1 or subchunk < 1 or subchunk & (subchunk - 1):
        raise ValueError(
            "chunk_size must be at least 1 and subchunk a power of two; got "
            f"{chunk_size} and {subchunk}"
        )
