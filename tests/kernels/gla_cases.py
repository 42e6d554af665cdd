"""What the Triton form of gated linear attention is tested with, on the CPU and on a GPU.

Cases, their random inputs, the reference in float64 with every gradient, and the errors allowed.
The reference is the recurrence, or the chunkwise form where the recurrence would take too long.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from gatebook.kernels import bidirectional_gla, gla
from gatebook.kernels.gated_linear_attention.chunked import chunked_gla
from gatebook.kernels.gated_linear_attention.naive import naive_gla

# RMS error relative to the RMS of the reference. The largest error, too, is measured against that
# RMS and may be ten times as large, on top of one unit in the last place of the number itself in
# the inputs' type: products of four factors reach 20 times their RMS, a unit of which is 0.1.
# "tf32" is float32 whose matrix products may round their factors to 11 bits.
ALLOWED = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 5e-3}
STEPS = (0.0, -1e-4, -1.0, -20.0, -80.0)  # log gates
CLOSED = (-1e9, float("-inf"))
LIMITS = (-1.25, -2.5, -3.0, -6.0)  # decay over 32 or 16 tokens within float32, or outside
GATES = (*STEPS, *CLOSED, *LIMITS, "ordinary", "by channel", "by element", "closed by element")


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Tensor | float) -> tuple:
    """The chunkwise form, whose sums of gates must be finite; e^-10000 is 0 in float64, too."""
    return chunked_gla(q, k, v, g.clamp(min=-1e4), *rest, chunk_size=64, subchunk=16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes, gates and how the tensors are laid out."""

    batch: int = 1
    length: int = 40  # T
    heads: int = 2
    keys: int = 16  # K
    values: int = 32  # V
    dtype: str = "float32"  # of q, k and v
    gate: float | str = "ordinary"  # log gate of every step, or which mixture
    gate_per_head: bool = False  # g is [B, T, H, 1]
    lengths: tuple[int, ...] = ()  # packed sequences, instead of batch and length
    reverse: bool = False
    initial_state: bool = True
    final_state: bool = True  # whether it is asked for and has a gradient
    layout: str = "contiguous"  # or "inside NaN" or "channels first"

    def __str__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "default"

    @property
    def n_sequences(self) -> int:
        return len(self.lengths) or self.batch

    @property
    def offsets(self) -> list[int]:
        return list(itertools.accumulate(self.lengths, initial=0))


LENGTHS = [Case(length=length) for length in (1, 15, 16, 17, 63, 64, 65, 130)]
GATED = [Case(length=70, gate=gate) for gate in GATES]
FEATURES = [
    Case(batch=2, length=33),
    Case(gate_per_head=True),
    Case(layout="inside NaN", length=41),
    Case(layout="channels first", batch=2, length=41),
    Case(initial_state=False),
    Case(final_state=False),
    Case(initial_state=False, final_state=False, gate="by channel"),
    Case(reverse=True, length=77),
    Case(reverse=True, length=77, gate="by element"),
    Case(lengths=(33, 1, 64, 15)),
    Case(lengths=(17, 0, 40, 0)),
    Case(lengths=(65, 1, 20), reverse=True, gate_per_head=True),
]


def parametrise(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def log_gates(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    """Gates near exp(−0.8 / 16), as in the paper, or the same at every step, or a mixture."""
    if case.gate == "ordinary":
        return torch.nn.functional.logsigmoid(normal(generator, *shape)) / 16
    if case.gate == "by channel":
        return torch.tensor(STEPS)[torch.arange(shape[-1]) % len(STEPS)].expand(shape).clone()
    if case.gate in ("by element", "closed by element"):
        steps = torch.tensor(STEPS if case.gate == "by element" else (*STEPS[:3], *CLOSED))
        return steps[torch.randint(len(steps), shape, generator=generator)]
    return torch.full(shape, case.gate)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers `[B, T, H, D]` in another place."""
    if layout == "channels first":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "inside NaN":
        b, t, h, d = x.shape
        wide = x.new_full((b, t + 2, h + 1, d + 3), float("nan"))
        wide[:, 1:-1, 1:, 1:-2] = x
        return wide[:, 1:-1, 1:, 1:-2]
    return x


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tensors of a case, with the gradients that come back to outputs and final state."""

    tensors: tuple[Tensor, ...]  # q, k, v, g (two gates for the bidirectional form)
    state: Tensor | None
    do: Tensor
    d_state: Tensor | None


def inputs(case: Case, device: str = "cpu", *, seed: int = 0, n_gates: int = 1) -> Inputs:
    """Signed random tensors, the same on every device."""
    gen = torch.Generator().manual_seed(seed)
    tokens = (1, sum(case.lengths)) if case.lengths else (case.batch, case.length)
    shape, states = (*tokens, case.heads), (case.n_sequences, case.heads, case.keys, case.values)
    widths = (case.keys, case.keys, case.values, case.values)
    rows = [normal(gen, *shape, width).to(getattr(torch, case.dtype)) for width in widths]
    width = 1 if case.gate_per_head else case.keys
    rows += [log_gates(case, gen, *shape, width) for _ in range(n_gates)]
    q, k, v, do, *gates = (laid_out(x.to(device), case.layout) for x in rows)
    state, d_state = (laid_out(normal(gen, *states).to(device), case.layout) for _ in range(2))
    return Inputs(
        tensors=(q, k, v, *gates),
        state=state if case.initial_state else None,
        do=do,
        d_state=d_state if case.final_state else None,
    )


def double(xs: Inputs) -> Inputs:
    state, d_state = (None if x is None else x.double() for x in (xs.state, xs.d_state))
    tensors = tuple(x.double() for x in xs.tensors)
    return Inputs(tensors=tensors, state=state, do=xs.do.double(), d_state=d_state)


def everything(call: Callable, xs: Inputs) -> dict[str, Tensor]:
    """The two results of `call(*tensors, state)`, and the gradients of all inputs."""
    names = ["dq", "dk", "dv", "dg", "dg back"][: len(xs.tensors)]
    leaves = [x.detach().requires_grad_() for x in xs.tensors]
    state = None if xs.state is None else xs.state.detach().requires_grad_()
    o, last = call(*leaves, state)
    found, grads = {"o": o}, {"o": xs.do}
    if xs.d_state is not None:
        found["final state"], grads["final state"] = last, xs.d_state
    if state is not None:
        names, leaves = [*names, "d initial state"], [*leaves, state]
    gradients = torch.autograd.grad(list(found.values()), leaves, list(grads.values()))
    return {k: x.detach() for k, x in found.items()} | dict(zip(names, gradients, strict=True))


def offsets(case: Case, device: torch.device) -> Tensor | None:
    return torch.tensor(case.offsets, dtype=torch.int32, device=device) if case.lengths else None


def causal(case: Case, xs: Inputs, backend: str = "triton") -> dict[str, Tensor]:
    """What `gla` gives."""
    options = {"backend": backend, "cu_seqlens": offsets(case, xs.do.device)}
    options |= {"reverse": case.reverse, "output_final_state": case.final_state}
    return everything(lambda *args: gla(*args[:4], initial_state=args[4], **options), xs)


def bidirectional(case: Case, xs: Inputs, backend: str = "triton") -> dict[str, Tensor]:
    """What `bidirectional_gla` gives, from inputs with two gates and no states."""
    options = {"backend": backend, "cu_seqlens": offsets(case, xs.do.device)}
    return everything(lambda *args: (bidirectional_gla(*args[:5], **options), None), xs)


def reference(case: Case, xs: Inputs, form: Callable = naive_gla) -> dict[str, Tensor]:
    """What `gla` should give: `form` in float64, one sequence after the other."""
    return everything(lambda *args: _walk(form, case, *args, case.reverse), double(xs))


def bidirectional_reference(
    case: Case, xs: Inputs, form: Callable = naive_gla
) -> dict[str, Tensor]:
    """What `bidirectional_gla` should give: the mean of `form` from both ends, in float64."""

    def call(q: Tensor, k: Tensor, v: Tensor, there: Tensor, back: Tensor, state: None) -> tuple:
        first, _ = _walk(form, case, q, k, v, there, state, False)
        second, _ = _walk(form, case, q, k, v, back, state, True)
        return (first + second) / 2, state

    return everything(call, double(xs))


def _walk(
    form: Callable,
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    if state is None:
        state = q.new_zeros(case.n_sequences, case.heads, case.keys, case.values)
    whole = (q, k, v, g.expand(k.shape))
    if not case.lengths:
        return _walk_one(form, whole, state, reverse)
    parts = zip(*(x.split(list(case.lengths), 1) for x in whole), strict=True)
    pairs = zip(parts, state.split(1), strict=True)
    outputs, states = zip(*(_walk_one(form, *pair, reverse) for pair in pairs), strict=True)
    return torch.cat(outputs, 1), torch.cat(states)


def _walk_one(
    form: Callable, qkvg: tuple[Tensor, ...], state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    q, k, v, g = (x.flip(1) for x in qkvg) if reverse else qkvg
    if q.shape[1] == 0:
        return v, state
    o, state = form(q, k, v, g, q.shape[-1] ** -0.5, state)
    return o.flip(1) if reverse else o, state


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def summands(name: str, want: dict[str, Tensor], xs: Inputs) -> Tensor:
    """The numbers whose size an error is compared with: the reference itself, but for gates.

    The gradient of a gate is a sum of q ⊙ dq − k ⊙ dk over the tokens of its channel, which cancels
    where the gate is closed. Rounding is of the size of the summands.
    """
    if not name.startswith("dg"):
        return want[name]
    terms = xs.tensors[0].double() * want["dq"]
    return terms.sum(-1, keepdim=True) if want[name].shape[-1] == 1 else terms


def errors(found: dict[str, Tensor], want: dict[str, Tensor], xs: Inputs) -> dict[str, tuple]:
    """Relative RMS error and largest error (beyond one unit) of each output and gradient."""
    assert found.keys() == want.keys()
    table = {}
    for name, x in found.items():
        assert x.shape == want[name].shape, name
        assert torch.isfinite(x).all(), f"{name} is not finite"
        off, terms = (x.double() - want[name]).abs(), summands(name, want, xs)
        size = max(rms(want[name]), rms(terms), 1e-30)  # all zero behind closed gates
        largest = terms.abs().amax(1, keepdim=True) if name.startswith("dg") else terms.abs()
        beyond = off - torch.finfo(xs.do.dtype).eps * torch.maximum(want[name].abs(), largest)
        table[name] = rms(off) / size, beyond.max().item() / size
    return table


def assert_right(
    found: dict[str, Tensor], want: dict[str, Tensor], xs: Inputs, kind: str | None = None
) -> None:
    """Every error is within what `ALLOWED` allows for this kind of arithmetic, the inputs' type."""
    allowed = ALLOWED[kind or str(xs.do.dtype).removeprefix("torch.")]
    for name, (mean, most) in errors(found, want, xs).items():
        assert mean <= allowed, f"{name}: relative RMS error {mean:.1e}"
        assert most <= 10 * allowed, f"{name}: largest relative error {most:.1e}"
