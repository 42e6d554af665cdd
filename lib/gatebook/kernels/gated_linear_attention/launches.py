"""What is launched for gated linear attention on a GPU: `Operator` (kernels: `gpu/`).

`prepare` works on all chunks at once; `sweep` then walks each sequence with the state on the chip
and writes the outputs. Backward: the states are computed again and written, once from each end, and
`gradients` works on all chunks at once; dV is the output of the backward sweep.

A batch of few long sequences would leave most of the GPU idle in a sweep. Their sequences are cut
into segments: a first sweep finds what each segment adds to the state, `join` carries the states
from segment to segment, and the second sweep starts everywhere at once.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gatebook.kernels.gated_linear_attention.gpu import plan as planning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Side:
    """One direction: its gates `[B, T, H, K or 1]` and what `prepare` made of them, `[N, H, …]`."""

    gates: Tensor
    reverse: bool
    queries: Tensor  # Q ⊙ Λ
    keys: Tensor  # K ⊙ Γ
    middle: Tensor  # g in the middle of a chunk
    total: Tensor  # g at its end
    smooth: Tensor  # 1 where the factors of P stay in range

    @property
    def made(self) -> tuple[Tensor, ...]:
        """What backward needs besides the gates."""
        return self.queries, self.keys, *self.marks

    @property
    def marks(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `gradients` needs of it."""
        return self.middle, self.total, self.smooth


class Operator:
    """All launches for tensors of one shape, type and place; use `operator_for`, which keeps it."""

    def __init__(
        self,
        shape: tuple[int, ...],
        values: int,
        dtype: torch.dtype,
        device: torch.device,
        offsets: tuple[int, ...] | None,
    ) -> None:
        import triton.language as tl

        from gatebook.kernels.gated_linear_attention.gpu import gradients, prepare, step, sweep

        batch, length, self.heads, self.keys = shape
        self.shape, self.values, self.dtype, self.device = shape, values, dtype, device
        self.tiles = planning.tiles(self.keys, values, dtype)
        widest = max(self.tiles.output.columns, self.tiles.states.columns)
        self.wide = -(-values // widest) * widest
        if offsets is None:
            offsets = tuple(range(0, batch * length + 1, length))
        programs = self.wide // self.tiles.output.columns * self.heads
        self.plan = planning.plan(offsets, self.tiles.chunk, programs, device)
        self.kernels = {
            "prepare": prepare.prepare,
            "sweep": sweep.sweep,
            "join": sweep.join,
            "score_gradients": gradients.score_gradients,
            "gradients": gradients.gradients,
            "step": step.step,
        }
        self.fixed = {
            "C": self.tiles.chunk,
            "WIDTH": self.tiles.width,
            "KIND": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            "DOT": "tf32x3",  # for float32: three products that keep its precision
        }
        ones = torch.ones(2, self.tiles.chunk, self.tiles.chunk, dtype=dtype)
        self.masks = torch.stack([ones[0].tril(), ones[1].triu()]).to(device)
        self.ready: dict[tuple, tuple[Any, tuple]] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        args: tuple,
        options: dict[str, Any],
        given: tuple[Tensor, ...] = (),
    ) -> None:
        """Launches a kernel, from the second time on without Triton's look-up, which costs more.

        What Triton compiles anew for is fixed by the shape and `options`, and by the strides and
        alignment of the tensors that were `given` to us.
        """
        key = (name, *options.values(), *[(x.stride(), x.data_ptr() % 16) for x in given])
        if key in self.ready:
            run, constants = self.ready[key]
            run(*args, *constants)
            return
        kernel = self.kernels[name]
        options = {n: x for n, x in self.fixed.items() if n in kernel.arg_names} | options
        compiled = kernel[grid](*args, **options)
        if not INTERPRETED:
            constants = tuple(options[n] for n in kernel.arg_names[len(args) :])
            self.ready[key] = compiled[grid], constants

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def like(self, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(*self.shape[:3], channels, dtype=dtype)

    def states(self, n: int, dtype: torch.dtype) -> Tensor:
        return self.empty(n, self.heads, self.tiles.width, self.wide, dtype=dtype)

    def padded(self, state: Tensor | None) -> Tensor | None:
        """A state `[sequences, H, K, V]` with its channels padded to whole blocks."""
        if state is None:
            return None
        extra = (0, self.wide - self.values, 0, self.tiles.width - self.keys)
        return (F.pad(state, extra) if any(extra) else state).contiguous()

    def cropped(self, ends: Tensor, descending: bool) -> Tensor:
        """The state after each whole sequence `[sequences, H, K, V]`, from those of segments."""
        if self.plan.cut:
            ends = ends[self.plan.firsts if descending else self.plan.lasts]
        return ends[:, :, : self.keys, : self.values]

    def prepare(
        self, q: Tensor, k: Tensor, gates: dict[bool, Tensor], scale: float
    ) -> tuple[list[Side], Tensor]:
        """`gates` by direction: False forward, True in reverse. Gives the sides and P."""
        n, h, size, ways = self.plan.n_chunks, self.heads, self.tiles, len(gates)
        decayed = self.empty(2, ways, n, h, size.chunk, size.width)
        marks = self.empty(2, ways, n, h, size.width, dtype=torch.float32)
        smooth = self.empty(ways, n, h, dtype=torch.int32)
        p = self.empty(n, h, size.chunk, size.chunk)
        first, last = gates.get(False, gates.get(True)), gates.get(True, gates.get(False))
        made = (decayed[0], decayed[1], marks[0], marks[1], smooth)
        args = (
            *(q, k, first, last),
            *made,
            p,
            self.plan.chunks,
            scale,
            *q.stride()[1:3],
            *k.stride()[1:3],
            *first.stride()[1:3],
            *last.stride()[1:3],
            *(h, self.keys, n),
        )
        options = {
            **size.prepare,
            "FORWARD_SHARED": first.shape[3] < self.keys,
            "REVERSE_SHARED": last.shape[3] < self.keys,
            "FORWARD": False in gates,
            "REVERSE": True in gates,
        }
        self.launch("prepare", (n, h, 1), args, options, (q, k, first, last))
        sides = [
            Side(gates[way], way, *(x[i] for x in made)) for i, way in enumerate(sorted(gates))
        ]
        return sides, p

    def sweep(
        self,
        kind: planning.Sweep,
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
        end: bool = False,
        decay: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """States on entering each chunk (if `store`), and after each segment (if `end`)."""
        states = self.states(self.plan.n_chunks, self.dtype) if store else None
        ends = self.states(self.plan.n_segments, torch.float32) if end else None
        args = (
            *(a, b, total, p, x, y, states, start, ends, decay),
            self.plan.segments,
            *x.stride()[1:3],
            *(y.stride()[1:3] if y is not None else (0, 0)),
            *(self.heads, self.values, self.wide),
        )
        options = {
            "BLOCK": kind.columns,
            "DESCENDING": descending,
            "OUTPUT": "none" if y is None else "add" if p is None else "full",
            "TRANSPOSED": transposed,
            "STORE": store,
            "START": start is not None,
            "END": end,
            "DECAY": decay is not None,
            **kind.options,
        }
        grid = (self.wide // kind.columns, self.plan.n_segments, self.heads)
        self.launch("sweep", grid, args, options, (x,))
        return states, ends

    def starts(
        self, b: Tensor, total: Tensor, x: Tensor, start: Tensor | None, descending: bool
    ) -> Tensor | None:
        """The state before each segment, from that before each sequence."""
        start = self.padded(start)
        if not self.plan.cut:
            return start
        width, kind = self.tiles.width, self.tiles.states
        decay = self.empty(self.plan.n_segments, self.heads, width, dtype=torch.float32)
        way = {"descending": descending, "end": True, "decay": decay}
        _, local = self.sweep(kind, b, b, total, x, None, **way)
        options = {
            "BLOCK": kind.columns,
            "DESCENDING": descending,
            "START": start is not None,
            "num_warps": 4,
        }
        grid = (self.wide // kind.columns, self.plan.n_sequences, self.heads)
        args = (local, decay, start, self.plan.runs, self.heads, self.wide)
        self.launch("join", grid, args, options)
        return local

    def outputs(
        self,
        side: Side,
        v: Tensor,
        p: Tensor | None,
        o: Tensor,
        start: Tensor | None = None,
        end: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Writes the outputs (adds to them if there is no P).

        Returns:
            The state before each segment, and that after each sequence if `end`.
        """
        way = side.reverse
        starts = self.starts(side.keys, side.total, v, start, way)
        a, b, kind = side.queries, side.keys, self.tiles.output
        _, ends = self.sweep(kind, a, b, side.total, v, starts, descending=way, p=p, y=o, end=end)
        return starts, self.cropped(ends, way) if end else None

    def state_gradients(
        self,
        side: Side,
        v: Tensor,
        p: Tensor | None,
        starts: Tensor | None,
        do: Tensor,
        d_end: Tensor | None,
        dv: Tensor,
        d_start: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Writes dV (adds to it if there is no P).

        Returns:
            The states and their gradients, each on entering a chunk in its direction, and the
            gradient of the state before each sequence if `d_start`.
        """
        a, b, total = side.keys, side.queries, side.total
        there, back = side.reverse, not side.reverse
        states, _ = self.sweep(
            self.tiles.states, a, a, total, v, starts, descending=there, store=True
        )
        ends = self.starts(b, total, do, d_end, back)
        way = {"descending": back, "p": p, "y": dv, "transposed": True, "store": True}
        d_states, d_starts = self.sweep(
            self.tiles.backward, a, b, total, do, ends, **way, end=d_start
        )
        return states, d_states, self.cropped(d_starts, back) if d_start else None

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        marks: tuple[Tensor, Tensor, Tensor],
        reverse: bool,
        scale: float,
        do: Tensor,
        both_states: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor],
        add: bool = False,
    ) -> Tensor:
        """Writes dq and dk, or adds to them; gives the gradient of the gates in `inputs`."""
        q, k, v, g = inputs
        n, h = self.plan.n_chunks, self.heads
        dp = self.empty(n, h, self.tiles.chunk, self.tiles.chunk)
        strides = (*v.stride()[1:3], *do.stride()[1:3])
        args = (v, do, dp, self.plan.chunks, *strides, h, self.values, self.wide)
        options = {**self.tiles.score_gradients, "REVERSE": reverse}
        self.launch("score_gradients", (n, h, 1), args, options, (v, do))
        gates = g if g.shape == k.shape else g.expand(k.shape).contiguous()
        da = self.like(self.keys, torch.float32)
        args = (
            *(q, k, gates, v, do, *both_states, dp, *marks, *grads, da),
            *(self.plan.chunks, self.masks, scale),
            *q.stride()[1:3],
            *k.stride()[1:3],
            *gates.stride()[1:3],
            *strides,
            *(h, self.keys, self.values, self.wide),
        )
        grid = (self.tiles.width // self.tiles.gradients["BLOCK"], n, h)
        for smooth in (True, False):
            options = {**self.tiles.gradients, "SMOOTH": smooth, "REVERSE": reverse, "ADD": add}
            self.launch("gradients", grid, args, options, (q, k, gates, v, do))
        return da if g.shape == k.shape else da.sum(-1, keepdim=True)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One token of each sequence: its output, and the state after it."""
        batch, h = self.shape[0], self.heads
        gates, state = g.expand(k.shape), None if state is None else state.contiguous()
        o = self.like(self.values)
        after = self.empty(batch, h, self.keys, self.values, dtype=torch.float32)
        args = (
            *(q, k, v, gates, state, o, after, scale),
            *q.stride()[1:3],
            *k.stride()[1:3],
            *v.stride()[1:3],
            *gates.stride()[1:],
            *(h, self.keys, self.values),
        )
        options = {**self.tiles.step, "START": state is not None}
        grid = (-(-self.values // options["BLOCK"]), batch, h)
        given = tuple(x for x in (q, k, v, gates, state) if x is not None)
        self.launch("step", grid, args, options, given)
        return o, after


@lru_cache(maxsize=64)
def _operator(*key: Any) -> Operator:
    return Operator(*key)


def operator_for(q: Tensor, v: Tensor, offsets: tuple[int, ...] | None) -> Operator:
    """The launches for tensors like these, kept from the first call on."""
    return _operator(tuple(q.shape), v.shape[-1], v.dtype, q.device, offsets)
