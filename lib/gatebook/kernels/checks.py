"""What the operators of linear attention accept; each check raises a ValueError that says it.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, N sequences (B, unless they
are packed along T). Only `host_offsets` reads numbers back from the device.
"""

import torch
from torch import Tensor


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> None:
    """Shapes, types and devices of queries, keys, values and each array of gates."""
    fits = q.ndim == v.ndim == 4 and k.shape == q.shape and v.shape[:3] == q.shape[:3]
    if not fits or 0 in q.shape or 0 in v.shape:
        raise ValueError(
            "q and k need one shape [B, T, H, K] and v [B, T, H, V], none of them empty; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if len({x.device for x in (q, k, v, *gates)}) > 1:
        devices = ", ".join(str(x.device) for x in (q, k, v, *gates))
        raise ValueError(f"q, k, v and g need to be on one device; got {devices}")
    for g in gates:
        _check_gate(q, k, v, g)


def _check_gate(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
    if g.shape not in (q.shape, (*q.shape[:3], 1)):
        raise ValueError(
            f"g needs the shape of k, {list(k.shape)}, or {[*k.shape[:3], 1]}; got {list(g.shape)}"
        )
    wanted = torch.promote_types(q.dtype, torch.float32)
    if not (q.is_floating_point() and q.dtype == k.dtype == v.dtype and g.dtype == wanted):
        raise ValueError(
            "q, k and v need one floating type, and g float32 (float64 with float64 q); got "
            f"{q.dtype}, {k.dtype}, {v.dtype} and {g.dtype}"
        )


def check_state(state: Tensor | None, shape: tuple[int, ...], g: Tensor) -> None:
    """The initial state `[N, H, K, V]`, in the type and on the device of the gates."""
    if state is None:
        return
    if state.shape != shape or state.dtype != g.dtype or state.device != g.device:
        raise ValueError(
            f"initial_state needs the shape {list(shape)}, type {g.dtype} and device {g.device}; "
            f"got {list(state.shape)}, {state.dtype} and {state.device}"
        )


def check_options(backend: str, backends: tuple[str, ...], chunk_size: int, subchunk: int) -> None:
    """The name of the form and its block lengths."""
    if backend not in backends:
        raise ValueError(f"backend must be one of {', '.join(backends)}; got {backend!r}")
    if not (isinstance(chunk_size, int) and isinstance(subchunk, int)):
        raise ValueError(f"chunk_size and subchunk are whole numbers; got {chunk_size}, {subchunk}")
    if chunk_size < 1 or subchunk < 1 or subchunk & (subchunk - 1):
        raise ValueError(
            "chunk_size must be at least 1 and subchunk a power of two; got "
            f"{chunk_size} and {subchunk}"
        )


def host_offsets(cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """The offsets of packed sequences, on the CPU and checked; None when there are none."""
    if cu_seqlens is None:
        return None
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens packs sequences along T and needs B = 1; got B = {q.shape[0]}"
        )
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens needs a tensor of offsets; got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens needs offsets [N + 1] of type int32 or int64; got "
            f"{list(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        )
    offsets = cu_seqlens.cpu()
    ends = (0, q.shape[1])
    if len(offsets) < 2 or (offsets[0], offsets[-1]) != ends or (offsets.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must start at 0, not decrease and end at T = {q.shape[1]}; got "
            f"{offsets.tolist()}"
        )
    return offsets
