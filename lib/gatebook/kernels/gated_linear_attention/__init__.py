"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): one operator, several forms."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gatebook.kernels import checks
from gatebook.kernels.gated_linear_attention.chunked import chunked_gla
from gatebook.kernels.gated_linear_attention.naive import (
    factorised_gla,
    naive_gla,
    parallel_gla,
)

__all__ = ["BACKENDS", "gla"]

BACKENDS = ("auto", "naive", "parallel", "factorised", "chunked", "triton")
CLOSED = -100.0  # e^-100 is nothing; sums of far smaller gates would drown those of open ones
_WRITTEN_OUT = {"naive": naive_gla, "parallel": parallel_gla, "factorised": factorised_gla}
Form = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
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
            float64 when q is float64. Not positive for a memory that decays; not checked. Minus
            infinity closes a gate; below -100, where e^g is nothing, a gate counts as -100.
        scale: The factor s; `K ** -0.5` when None (as in the released code; the text has none).
        initial_state: S_0 `[N, H, K, V]` in the type of g; zeros when None. N is B, or the number
            of packed sequences.
        output_final_state: Whether to return S_T as well.
        cu_seqlens: Offsets `[N + 1]`, int32 or int64, of N sequences of different lengths that lie
            one after the other along T, with B = 1: sequence n is tokens `cu_seqlens[n]` to
            `cu_seqlens[n + 1] - 1`. They start at 0, do not decrease and end at T. An empty
            sequence keeps its state. Read to the host once; offsets on the CPU save the wait.
        reverse: Whether each sequence is walked from its last token to its first, so that S_0 comes
            after the last token and S_T belongs to the first.
        backend: "naive" (token by token), "parallel" (T × T, memory T² K), "factorised" (T × T as
            printed in §4.2, which overflows), "chunked" (chunk by chunk with secondary chunking),
            "triton" (the same as a GPU kernel, not in float64; one token without gradients takes
            one step of the recurrence) or "auto": "triton" for CUDA tensors that it supports,
            otherwise "chunked".
        chunk_size: The paper's C for "chunked", rounded up to a multiple of the sub-chunk.
        subchunk: The paper's c for "chunked", a power of two.

    Returns:
        The outputs `[B, T, H, V]` in the type of v, and S_T `[N, H, K, V]` in the type of g, or
        None unless `output_final_state`.

    Raises:
        ValueError: A shape, type, device, offset, backend or block length that is not allowed; it
            says what is.
    """
    checks.check_tensors(q, k, v, g)
    checks.check_options(backend, BACKENDS, chunk_size, subchunk)
    offsets = checks.host_offsets(cu_seqlens, q)
    n_sequences = q.shape[0] if offsets is None else len(offsets) - 1
    state_shape = (n_sequences, *q.shape[2:], v.shape[3])
    checks.check_state(initial_state, state_shape, g)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q.device.type):
        if choose_backend(backend, q, v, g) == "triton":
            inputs = (q, k, v, g, scale, initial_state, offsets)
            return _triton_gla(*inputs, output_final_state=output_final_state, reverse=reverse)
        form = _plain_form(backend, chunk_size, subchunk, reverse, offsets)
        state = g.new_zeros(state_shape) if initial_state is None else initial_state
        o, state = form(q, k, v, g.clamp(min=CLOSED).expand(k.shape), scale, state)
    return o.to(v.dtype), state if output_final_state else None


def choose_backend(backend: str, q: Tensor, v: Tensor, g: Tensor) -> str:
    """What "auto" stands for; "triton" only where its kernel takes these tensors, else an error."""
    if backend not in ("auto", "triton"):
        return backend
    if backend == "auto" and (not q.is_cuda or q.dtype == torch.float64):
        return "chunked"
    from gatebook.kernels.gated_linear_attention import fused

    try:
        fused.check_supported(q, v, g)
    except ValueError:
        if backend == "triton":
            raise
        return "chunked"
    return "triton"


def full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Keeps autocast out: the operator itself decides what runs in low precision."""
    if torch.amp.is_autocast_available(device_type):  # the meta device has none
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _triton_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    state: Tensor | None,
    offsets: Tensor | None,
    **options: bool,
) -> tuple[Tensor, Tensor | None]:
    """The Triton kernels; for one token without gradients, a step of the recurrence."""
    from gatebook.kernels.gated_linear_attention import fused

    inputs = [x for x in (q, k, v, g, state) if x is not None]
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if q.shape[1] > 1 or offsets is not None or learning:
        return fused.fused_gla(q, k, v, g, scale, state, offsets, **options)
    o, state = fused.step(q, k, v, g, scale, state)
    return o, state if options["output_final_state"] else None


def _plain_form(
    backend: str, chunk_size: int, subchunk: int, reverse: bool, offsets: Tensor | None
) -> Form:
    """A PyTorch form by name, made to walk backwards or over packed sequences if so wanted."""
    if backend in _WRITTEN_OUT:
        form = partial(_in_type_of_gates, _WRITTEN_OUT[backend])
    else:
        form = partial(chunked_gla, chunk_size=chunk_size, subchunk=subchunk)
    if reverse:
        form = partial(_from_last_to_first, form)
    return form if offsets is None else partial(_one_by_one, form, offsets.tolist())


def _in_type_of_gates(form: Form, *args: Tensor | float) -> tuple[Tensor, Tensor]:
    *qkv, g, scale, state = args
    return form(*(x.to(g.dtype) for x in qkv), g, scale, state)


def _from_last_to_first(form: Form, *args: Tensor | float) -> tuple[Tensor, Tensor]:
    *qkvg, scale, state = args
    o, state = form(*(x.flip(1) for x in qkvg), scale, state)
    return o.flip(1), state


def _one_by_one(form: Form, bounds: list[int], *args: Tensor | float) -> tuple[Tensor, Tensor]:
    *qkvg, scale, state = args
    outputs, states = [], list(state.split(1))
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:  # an empty sequence keeps its state
            o, states[n] = form(*(x[:, start:end] for x in qkvg), scale, states[n])
            outputs.append(o)
    return torch.cat(outputs, 1), torch.cat(states)
