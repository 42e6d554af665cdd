"""Gated linear attention in Triton: what the kernels take, and the operators with gradients."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatebook.kernels.gated_linear_attention.launches import INTERPRETED, Side, operator_for

__all__ = ["check_supported", "fused_bidirectional_gla", "fused_gla", "step"]

MAX_KEYS, MAX_VALUES = 256, 512


def check_supported(q: Tensor, v: Tensor, g: Tensor) -> None:
    """Whether the kernels take these tensors.

    Args:
        q: Queries `[B, T, H, K]`.
        v: Values `[B, T, H, V]`.
        g: Log gates `[B, T, H, K]` or `[B, T, H, 1]`.

    Raises:
        ValueError: A device, type or width that the kernels do not take; it says what they take.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ValueError('backend="triton" needs the package triton; it is not installed') from None
    if not (q.is_cuda or (INTERPRETED and q.device.type == "cpu")):
        raise ValueError(
            'backend="triton" needs CUDA tensors (or, to try it out on the CPU, the environment '
            f"variable TRITON_INTERPRET=1 from the start, in float32); got tensors on {q.device}"
        )
    if q.dtype not in (torch.bfloat16, torch.float32) or g.dtype != torch.float32:
        raise ValueError(
            'backend="triton" takes q, k and v in bfloat16 or float32 and gates in float32; got '
            f'{q.dtype} and {g.dtype}. backend="chunked" takes every floating type'
        )
    if q.shape[-1] > MAX_KEYS or v.shape[-1] > MAX_VALUES:
        raise ValueError(
            f'backend="triton" takes at most {MAX_KEYS} key and {MAX_VALUES} value channels; got '
            f'{q.shape[-1]} and {v.shape[-1]}. backend="chunked" takes any'
        )


class _FusedGLA(torch.autograd.Function):
    """One direction."""

    @staticmethod
    def forward(ctx, q, k, v, g, start, scale, offsets, reverse, end):
        q, k, v, g = _rows(q), _rows(k), _rows(v), _rows(g)
        run = operator_for(q, v, offsets)
        (side,), p = run.prepare(q, k, {reverse: g}, scale)
        o = run.like(run.values)
        starts, end = run.outputs(side, v, p, o, start, end)
        ctx.save_for_backward(q, k, v, g, p, *side.made, starts)
        ctx.set_materialize_grads(False)
        ctx.run, ctx.scale, ctx.reverse = run, scale, reverse
        return o, end

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_end):
        q, k, v, g, p, *made, starts = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        side, run, wanted = Side(g, ctx.reverse, *made), ctx.run, ctx.needs_input_grad[4]
        do, marks = torch.zeros_like(v) if do is None else _rows(do), side.marks
        dv = run.like(run.values)
        *states, d_start = run.state_gradients(side, v, p, starts, do, d_end, dv, wanted)
        del side, made, p, starts  # frees what the rest does not need
        dq, dk = run.like(run.keys), run.like(run.keys)
        inputs, way = (q, k, v, g), ctx.reverse
        dg = run.gradients(inputs, marks, way, ctx.scale, do, tuple(states), (dq, dk))
        return dq, dk, dv, dg, d_start, None, None, None, None


class _FusedBidirectionalGLA(torch.autograd.Function):
    """Both directions, o = o→ + o←, whose scores are one matrix."""

    @staticmethod
    def forward(ctx, q, k, v, g_forward, g_reverse, scale, offsets):
        q, k, v = _rows(q), _rows(k), _rows(v)
        gates = {False: _rows(g_forward), True: _rows(g_reverse)}
        run = operator_for(q, v, offsets)
        sides, p = run.prepare(q, k, gates, scale)
        o = run.like(run.values)
        starts = [run.outputs(side, v, None if side.reverse else p, o)[0] for side in sides]
        made = [x for side in sides for x in (side.gates, *side.made)]
        ctx.save_for_backward(q, k, v, p, *made, *starts)
        ctx.run, ctx.scale = run, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, p, *made = ctx.saved_tensors
        run, do, dg, each = ctx.run, _rows(do), [], (len(made) - 2) // 2
        dq, dk, dv = (run.like(x.shape[-1]) for x in (q, k, v))
        for way in (False, True):
            g, *rest = made[way * each : (way + 1) * each]
            side, starts, scores = Side(g, way, *rest), made[way - 2], None if way else p
            *states, _ = run.state_gradients(side, v, scores, starts, do, None, dv, False)
            inputs, grads = (q, k, v, g), (dq, dk)
            dg.append(
                run.gradients(inputs, side.marks, way, ctx.scale, do, tuple(states), grads, add=way)
            )
        return dq, dk, dv, *dg, None, None


def _rows(x: Tensor) -> Tensor:
    """`x` itself where its channels lie together and its tokens evenly apart, else a copy."""
    together = x.stride(3) == 1 or x.shape[3] == 1
    evenly = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if together and evenly else x.contiguous()


def _offsets(cu_seqlens: Tensor | None) -> tuple[int, ...] | None:
    return None if cu_seqlens is None else tuple(cu_seqlens.tolist())


@torch.compiler.disable  # the kernels are compiled already
def fused_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The Triton form of `gatebook.kernels.gla`, which checks its arguments.

    Args:
        q: Queries `[B, T, H, K]`, bfloat16 or float32.
        k: Keys `[B, T, H, K]`.
        v: Values `[B, T, H, V]`.
        g: Natural-log gates `[B, T, H, K]` or `[B, T, H, 1]`, float32.
        scale: The factor s on the output.
        initial_state: The state before each sequence `[sequences, H, K, V]`, float32, or None.
        cu_seqlens: Offsets of sequences packed along T, or None for one in each row of the batch.
        output_final_state: Whether to return the state after each sequence.
        reverse: Whether to walk from the last token of each sequence to the first.

    Returns:
        The outputs `[B, T, H, V]`, and the states after each sequence or None.
    """
    with torch.cuda.device_of(q):
        return _FusedGLA.apply(
            *(q, k, v, g, initial_state),
            float(scale),
            _offsets(cu_seqlens),
            reverse,
            output_final_state,
        )


@torch.compiler.disable  # the kernels are compiled already
def fused_bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The Triton form of `gatebook.kernels.bidirectional_gla`: ½ (o→ + o←), `[B, T, H, V]`."""
    with torch.cuda.device_of(q):
        return _FusedBidirectionalGLA.apply(
            q, k, v, g_forward, g_backward, float(scale) / 2, _offsets(cu_seqlens)
        )


@torch.compiler.disable  # the kernels are compiled already
def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of decoding, without gradients.

    Args:
        q: Query `[B, 1, H, K]`.
        k: Key `[B, 1, H, K]`.
        v: Value `[B, 1, H, V]`.
        g: Natural-log gates `[B, 1, H, K]` or `[B, 1, H, 1]`, float32.
        scale: The factor s on the output.
        state: The state before the token `[B, H, K, V]`, float32, or None for zeros.

    Returns:
        The output `[B, 1, H, V]` and the state after the token, a new tensor.
    """
    q, k, v, g = _rows(q), _rows(k), _rows(v), _rows(g)
    with torch.cuda.device_of(q):
        return operator_for(q, v, None).step(q, k, v, g, float(scale), state)
