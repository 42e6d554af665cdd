"""Gated linear attention in Triton: plans, launches and gradients (kernels: `triton_kernels.py`).

Forward: `prepare` works on all chunks at once; `sweep` then walks each sequence with the state on
the chip and writes the outputs. Backward: the states are computed again and written, once from each
end, and `gradients` works on all chunks at once; dV is the output of the backward sweep.

A batch of few long sequences would leave most of the GPU idle in a sweep. Their sequences are cut
into segments: a first sweep finds what each segment adds to the state, `join` carries the states
from segment to segment, and the second sweep starts everywhere at once.
"""

import itertools
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["check_supported", "fused_bidirectional_gla", "fused_gla", "step"]

MAX_KEYS, MAX_VALUES = 256, 512
PROGRAMS = 256  # of a sweep, from which on it fills a GPU


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
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (q.is_cuda or (interpreted and q.device.type == "cpu")):
        raise ValueError(
            'backend="triton" needs CUDA tensors (or, to try it out on the CPU, the environment '
            f"variable TRITON_INTERPRET=1); got tensors on {q.device}"
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


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Tiles of each kernel, and its warps, pipeline stages and registers a thread."""

    chunk: int  # C
    width: int  # K, padded to a power of two
    columns: int  # value columns of a program of `sweep`
    prepare: dict[str, int]
    sweep: dict[str, int]
    score_gradients: dict[str, int]
    gradients: dict[str, int]


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@lru_cache
def _blocks(keys: int, values: int, dtype: torch.dtype) -> _Blocks:
    """The one choice of tiles for a shape and type; nothing is tuned at run time."""
    width, columns = _power(keys), _power(values)
    if dtype == torch.float32:
        plain = {"num_warps": 4, "num_stages": 1}
        return _Blocks(
            chunk=32,
            width=width,
            columns=min(columns, 32),
            prepare={"BLOCK": min(width, 32), **plain},
            sweep=plain,
            score_gradients={"COLUMNS": min(columns, 32), **plain},
            gradients={"BLOCK": min(width, 32), "COLUMNS": min(columns, 32), **plain},
        )
    wide = width > 128
    return _Blocks(
        chunk=64,
        width=width,
        columns=min(columns, 64),
        prepare={"BLOCK": min(width, 64), "num_warps": 8, "num_stages": 1, "maxnreg": 128},
        sweep={"num_warps": 8 if wide else 4, "num_stages": 2},
        score_gradients={"COLUMNS": min(columns, 64), "num_warps": 4, "num_stages": 3},
        gradients={
            "BLOCK": min(width, 32),
            "COLUMNS": min(columns, 64),
            "num_warps": 4,
            "num_stages": 3,
        },
    )


_compiled: dict[tuple, Any] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], args: tuple, options: dict[str, Any]) -> None:
    """Launches a kernel; from the second time on without Triton's look-up, which costs more.

    Triton compiles anew for other types, alignments and whole numbers; so does the key.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        kernel[grid](*args, **options)
        return
    key = (
        kernel,
        torch.cuda.current_device(),
        tuple((x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in args),
        tuple(options.values()),
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **options)
        _compiled[key] = compiled, tuple(options[x] for x in kernel.arg_names[len(args) :])
    else:
        compiled, constants = found
        compiled[grid](*args, *constants)


@dataclass(frozen=True)
class _Plan:
    """Where the chunks, the segments and the sequences lie in the tokens."""

    chunks: Tensor  # [N, 2]: first token, number of tokens
    segments: Tensor  # [S, 4]: first chunk, number of chunks, first token, number of tokens
    runs: Tensor  # [number of sequences, 2]: first segment, number of segments
    cut: bool  # whether a sequence has more than one segment
    outer: tuple[Tensor, Tensor]  # first and last segment of each sequence


@lru_cache(maxsize=64)
def _plan(offsets: tuple[int, ...], chunk: int, programs: int, device: torch.device) -> _Plan:
    """The plan for sequences between `offsets`; `programs` run for each segment."""
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    total = sum(-(-length // chunk) for length in lengths)
    longest = total  # chunks of a segment
    if programs * len(lengths) < PROGRAMS // 2:
        longest = max(8, -(-total * programs // PROGRAMS))
    chunks: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int]] = []
    for start, length in zip(offsets[:-1], lengths, strict=True):
        first = len(segments)
        for at in range(0, max(length, 1), longest * chunk):
            part = min(longest * chunk, length - at)
            segments.append((len(chunks), -(-part // chunk), start + at, part))
            chunks += [(start + at + c, min(chunk, part - c)) for c in range(0, part, chunk)]
        runs.append((first, len(segments) - first))
    table = [torch.tensor(rows, dtype=torch.int32).to(device) for rows in (chunks, segments, runs)]
    outer = (table[2][:, 0].long(), (table[2].sum(1) - 1).long())
    return _Plan(*table, len(segments) > len(runs), outer)


@dataclass(frozen=True)
class _Side:
    """One direction: its gates and what `prepare` made of them, `[N, H, …]`."""

    gates: Tensor
    reverse: bool
    queries: Tensor  # Q ⊙ Λ
    keys: Tensor  # K ⊙ Γ
    total: Tensor  # log2 γ
    smooth: Tensor  # 1 where `gradients` may form its factors as products

    @property
    def made(self) -> tuple[Tensor, ...]:
        """What backward needs besides the gates."""
        return self.queries, self.keys, self.total, self.smooth


class _Launcher:
    """The launches for tensors of one shape: `x` are always laid out `[tokens, H, D]`."""

    def __init__(self, q: Tensor, v: Tensor, offsets: tuple[int, ...]) -> None:
        import triton.language as tl

        self.tokens, self.heads, self.keys = q.shape
        self.values, self.dtype, self.device = v.shape[-1], v.dtype, v.device
        self.blocks = _blocks(self.keys, self.values, self.dtype)
        self.columns = -(-self.values // self.blocks.columns)  # blocks of value columns
        self.wide = self.columns * self.blocks.columns  # V, padded to whole blocks
        self.plan = _plan(offsets, self.blocks.chunk, self.columns * self.heads, self.device)
        self.n_chunks, self.n_segments = len(self.plan.chunks), len(self.plan.segments)
        exact = torch.get_float32_matmul_precision() == "highest"
        self.kind = {
            "KIND": tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32,
            "DOT": "ieee" if exact and self.dtype == torch.float32 else "tf32",
        }
        self.tile = {"C": self.blocks.chunk, "WIDTH": self.blocks.width}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def states(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(n, self.heads, self.blocks.width, self.wide, dtype=dtype)

    def padded(self, state: Tensor | None) -> Tensor | None:
        """A state `[sequences, H, K, V]` with its channels padded to whole blocks."""
        if state is None:
            return None
        extra = (0, self.wide - self.values, 0, self.blocks.width - self.keys)
        return torch.nn.functional.pad(state, extra).contiguous() if any(extra) else state

    def cropped(self, ends: Tensor, descending: bool) -> Tensor:
        """The state after each whole sequence `[sequences, H, K, V]`, from those of segments."""
        if self.plan.cut:
            ends = ends[self.plan.outer[not descending]]
        return ends[:, :, : self.keys, : self.values]

    def prepare(
        self, q: Tensor, k: Tensor, gates: dict[bool, Tensor], scale: float
    ) -> tuple[list[_Side], Tensor]:
        """`gates` by direction: False forward, True in reverse. Gives the sides and P."""
        from gatebook.kernels.gated_linear_attention import triton_kernels as kernels

        size, n = self.blocks, self.n_chunks
        queries, keys = (
            self.empty(len(gates), n, self.heads, size.chunk, size.width) for _ in range(2)
        )
        total = self.empty(len(gates), n, self.heads, size.width, dtype=torch.float32)
        smooth = self.empty(len(gates), n, self.heads, dtype=torch.int32)
        p = self.empty(n, self.heads, size.chunk, size.chunk)
        first, last = gates.get(False, gates.get(True)), gates.get(True, gates.get(False))
        args = (
            q,
            k,
            first,
            last,
            queries,
            keys,
            total,
            smooth,
            p,
            self.plan.chunks,
            scale,
            *q.stride()[:2],
            *k.stride()[:2],
            *first.stride(),
            *last.stride(),
            self.heads,
            self.keys,
            n,
        )
        ways = {"FORWARD": False in gates, "REVERSE": True in gates}
        options = self.tile | size.prepare | ways | self.kind
        _launch(kernels.prepare, (n, self.heads, 1), args, options)
        sides = [
            _Side(gates[reverse], reverse, queries[i], keys[i], total[i], smooth[i])
            for i, reverse in enumerate(sorted(gates))
        ]
        return sides, p

    def sweep(
        self,
        a: Tensor,
        b: Tensor,
        total: Tensor,
        x: Tensor,
        start: Tensor | None,
        *,
        descending: bool,
        p: Tensor | None = None,
        y: Tensor | None = None,
        transposed: bool = False,
        store: bool = False,
        decay: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """States on entering each chunk (if `store`), and the state after each segment."""
        from gatebook.kernels.gated_linear_attention import triton_kernels as kernels

        states = self.states(self.n_chunks, self.dtype) if store else None
        end = self.states(self.n_segments)
        args = (
            a,
            b,
            total,
            p,
            x,
            y,
            states,
            start,
            end,
            decay,
            self.plan.segments,
            *x.stride()[:2],
            *(y.stride()[:2] if y is not None else (0, 0)),
            self.heads,
            self.values,
            self.wide,
        )
        ways = {
            "BLOCK": self.blocks.columns,
            "DESCENDING": descending,
            "OUTPUT": "none" if y is None else "add" if p is None else "full",
            "TRANSPOSED": transposed,
            "STORE": store,
            "START": start is not None,
            "DECAY": decay is not None,
        }
        options = self.tile | ways | self.blocks.sweep | self.kind
        _launch(kernels.sweep, (self.columns, self.n_segments, self.heads), args, options)
        return states, end

    def starts(
        self, b: Tensor, total: Tensor, x: Tensor, start: Tensor | None, descending: bool
    ) -> Tensor | None:
        """The state before each segment, from that before each sequence."""
        from gatebook.kernels.gated_linear_attention import triton_kernels as kernels

        if not self.plan.cut:
            return start
        decay = self.empty(self.n_segments, self.heads, self.blocks.width, dtype=torch.float32)
        _, local = self.sweep(b, b, total, x, None, descending=descending, decay=decay)
        args = (local, decay, start, self.plan.runs, self.heads, self.wide)
        options = {
            "WIDTH": self.blocks.width,
            "BLOCK": self.blocks.columns,
            "DESCENDING": descending,
            "START": start is not None,
            "num_warps": 4,
        }
        _launch(kernels.join, (self.columns, len(self.plan.runs), self.heads), args, options)
        return local

    def outputs(self, side: _Side, v: Tensor, p: Tensor | None, o: Tensor, start: Tensor | None):
        """Writes the outputs (adds to them if there is no P); the states before and after."""
        descending = side.reverse
        starts = self.starts(side.keys, side.total, v, self.padded(start), descending)
        _, end = self.sweep(
            side.queries, side.keys, side.total, v, starts, descending=descending, p=p, y=o
        )
        return starts, end

    def backward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        side: _Side,
        p: Tensor | None,
        scale: float,
        starts: Tensor | None,
        do: Tensor,
        d_end: Tensor | None,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Writes dq, dk, dv (adds to them if there is no P); gives d log α and the start's."""
        from gatebook.kernels.gated_linear_attention import triton_kernels as kernels

        q, k, v = inputs
        dq, dk, dv = grads
        forth, back = side.reverse, not side.reverse
        states, _ = self.sweep(
            side.keys, side.keys, side.total, v, starts, descending=forth, store=True
        )
        ends = self.starts(side.queries, side.total, do, self.padded(d_end), back)
        d_states, d_start = self.sweep(
            side.keys,
            side.queries,
            side.total,
            do,
            ends,
            descending=back,
            p=p,
            y=dv,
            transposed=True,
            store=True,
        )
        dp = self.empty(self.n_chunks, self.heads, self.blocks.chunk, self.blocks.chunk)
        strides = (*v.stride()[:2], *do.stride()[:2])
        args = (v, do, dp, self.plan.chunks, *strides, self.heads, self.values, self.wide)
        options = self.tile | self.blocks.score_gradients | self.kind
        _launch(kernels.score_gradients, (self.n_chunks, self.heads, 1), args, options)
        da = self.empty(self.tokens, self.heads, self.keys, dtype=torch.float32)
        args = (
            q,
            k,
            side.gates,
            v,
            do,
            states,
            d_states,
            dp,
            side.smooth,
            dq,
            dk,
            da,
            self.plan.chunks,
            scale,
            *q.stride()[:2],
            *k.stride()[:2],
            *side.gates.stride(),
            *strides,
            self.heads,
            self.keys,
            self.values,
            self.wide,
        )
        grid = (self.blocks.width // self.blocks.gradients["BLOCK"], self.n_chunks, self.heads)
        for smooth in (True, False):
            ways = {"SMOOTH": smooth, "REVERSE": side.reverse, "ADD": p is None}
            options = self.tile | self.blocks.gradients | ways | self.kind
            _launch(kernels.gradients, grid, args, options)
        return da, self.cropped(d_start, back)


class _FusedGLA(torch.autograd.Function):
    """One direction. Tensors `[tokens, H, D]`, states `[sequences, H, K, V]`."""

    @staticmethod
    def forward(ctx, q, k, v, g, start, scale, offsets, reverse):
        launch = _Launcher(q, v, offsets)
        (side,), p = launch.prepare(q, k, {reverse: g}, scale)
        o = launch.empty(*v.shape)
        starts, end = launch.outputs(side, v, p, o, start)
        ctx.save_for_backward(q, k, v, g, p, *side.made, starts)
        ctx.launch, ctx.scale, ctx.reverse = launch, scale, reverse
        return o, launch.cropped(end, reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_end):
        q, k, v, g, p, *made, starts = ctx.saved_tensors
        side = _Side(g, ctx.reverse, *made)
        grads = tuple(ctx.launch.empty(*x.shape) for x in (q, k, v))
        da, d_start = ctx.launch.backward(
            (q, k, v), side, p, ctx.scale, starts, _rows(do), d_end, grads
        )
        return *grads, da, d_start if ctx.needs_input_grad[4] else None, None, None, None


class _FusedBidirectionalGLA(torch.autograd.Function):
    """Both directions, o = o→ + o←, whose scores are one matrix."""

    @staticmethod
    def forward(ctx, q, k, v, g_forward, g_reverse, scale, offsets):
        launch = _Launcher(q, v, offsets)
        sides, p = launch.prepare(q, k, {False: g_forward, True: g_reverse}, scale)
        o = launch.empty(*v.shape)
        starts = [
            launch.outputs(side, v, None if side.reverse else p, o, None)[0] for side in sides
        ]
        made = [x for side in sides for x in side.made]
        ctx.save_for_backward(q, k, v, g_forward, g_reverse, p, *made, *starts)
        ctx.launch, ctx.scale = launch, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, g_forward, g_reverse, p, *made = ctx.saved_tensors
        do, dg = _rows(do), []
        grads = tuple(ctx.launch.empty(*x.shape) for x in (q, k, v))
        for reverse, g, p_once in ((False, g_forward, p), (True, g_reverse, None)):
            side = _Side(g, reverse, *made[4 * reverse : 4 * reverse + 4])
            starts = made[8 + reverse]
            dg.append(
                ctx.launch.backward((q, k, v), side, p_once, ctx.scale, starts, do, None, grads)[0]
            )
        return *grads, *dg, None, None


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where rows of channels lie together, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """`[B, T, H, D]` as `[B T, H, D]`, without a copy where the strides allow it."""
    return x.flatten(0, 1)


def _offsets(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if cu_seqlens is None:
        return tuple(range(0, q.shape[0] * q.shape[1] + 1, q.shape[1]))
    return tuple(cu_seqlens.tolist())


def _gates(g: Tensor, k: Tensor) -> Tensor:
    return _flat(g).expand(-1, -1, k.shape[-1])


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
    rows = [_rows(_flat(x)) for x in (q, k, v)]
    start = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(q):
        o, end = _FusedGLA.apply(
            *rows, _gates(g, k), start, scale, _offsets(q, cu_seqlens), reverse
        )
    return o.unflatten(0, v.shape[:2]), end if output_final_state else None


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
    rows = [_rows(_flat(x)) for x in (q, k, v)]
    gates = [_gates(g, k) for g in (g_forward, g_backward)]
    with torch.cuda.device_of(q):
        o = _FusedBidirectionalGLA.apply(*rows, *gates, scale / 2, _offsets(q, cu_seqlens))
    return o.unflatten(0, v.shape[:2])


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
    import triton.language as tl

    from gatebook.kernels.gated_linear_attention import triton_kernels as kernels

    q, k, v, g = _rows(q[:, 0]), _rows(k[:, 0]), _rows(v[:, 0]), g[:, 0].expand(k[:, 0].shape)
    batch, heads, keys = q.shape
    values = v.shape[-1]
    o = torch.empty(batch, heads, values, dtype=v.dtype, device=v.device)
    after = torch.empty(batch, heads, keys, values, dtype=torch.float32, device=v.device)
    block = min(_power(values), 64)
    args = (
        q,
        k,
        v,
        g,
        None if state is None else state.contiguous(),
        o,
        after,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *g.stride(),
        heads,
        keys,
        values,
    )
    options = {
        "WIDTH": _power(keys),
        "BLOCK": block,
        "START": state is not None,
        "KIND": tl.bfloat16 if v.dtype == torch.bfloat16 else tl.float32,
        "num_warps": 4,
    }
    with torch.cuda.device_of(q):
        _launch(kernels.step, (-(-values // block), batch, heads), args, options)
    return o.unsqueeze(1), after
