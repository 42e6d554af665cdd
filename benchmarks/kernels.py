"""Benchmarks of the kernels. They measure every number that the page book/kernels shows.

    python benchmarks/kernels.py cpu                     chunkwise PyTorch on this CPU
    python benchmarks/kernels.py gpu                     the fused kernels, on one GPU
    python benchmarks/kernels.py gpu --baselines all     with fla, which compiles for minutes
    python benchmarks/kernels.py gpu --baselines all --fla-lengths 2048 --cases gla-340m
    python benchmarks/kernels.py gpu --device cpu --tokens 128 --lengths 64 --out dry.json

A suite prints each number as it is measured and saves its results file after each length, so that
a run that is cut off keeps what it had. A method that fails is reported and left out.

cases       gla-340m, gla-1.3b   one layer of the paper's models, 32,768 tokens a call
            gla-340m-batch1      short sequences, one a call
            bigla-340m           both directions, each with its own gates
            decode-340m          one token for each of 64 sequences, with their states
            fig2                 the paper's Figure 2: 32 sequences, 16 heads of 64, gates of 1
            gla-340m-cpu         one sequence on the CPU, float32
metrics     fwd, fwdbwd          median ms; forward is without gradients, forward + backward gives
                                 those of q, k, v and the gates for a fixed gradient of the output
            fwd_wall, fwdbwd_wall   ms a call when calls follow one another without a pause
            fwd_graph            the same without launches: the calls are in one CUDA graph, each
                                 with inputs of its own, so that none is read from a cache
            memory               MiB: peak of forward + backward above inputs and output gradient
            first_call           s: forward + backward in a new process, nothing compiled before
            error_o, error_dq …  RMS difference from float64 over the RMS of float64; one sequence
            error                the largest of these
methods     ours; fla (flash-linear-attention's chunk_gla or, for a step, fused_recurrent_gla),
            sdpa-flash and sdpa-cudnn (torch's softmax attention, heads of 64, equal total width),
            sdpa (its choice on the CPU), chunked (ours in plain PyTorch), naive (the recurrence),
            flips (two causal calls), causal (one causal call), floor (bytes over copy bandwidth:
            each pass reads its inputs once and writes its outputs once), copy (a copy that moves
            the bytes of the floor)
"""

import argparse
import importlib.metadata
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gatebook import kernels, measure
from gatebook.evidence import provenance
from gatebook.measure import records
from gatebook.measure.records import Record

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SHORT = (64, 128, 256, 512)
CPU_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SECONDS = {"cpu": 1.0, "cuda": 0.2}  # for each number; slow calls are timed three times at least
LONGEST_NAIVE = 2048  # on the CPU: the recurrence is slow
LONGEST_EXACT = 1024  # up to here the float64 reference is the recurrence, then the chunked form
TARGET = 20  # times faster than the recurrence on the CPU, forward and backward, T = 2048
BASELINES = (
    "floor",
    "sdpa",
    "sdpa-flash",
    "sdpa-cudnn",
    "naive",
    "chunked",
    "flips",
    "causal",
    "copy",
)
METRICS = ("fwd", "fwdbwd", "fwd_wall", "fwdbwd_wall", "fwd_graph", "memory", "first_call", "error")
CALLS_IN_GRAPH = 16
BUSY = 2  # ms for which a GPU is kept busy while the host launches what is timed
HEAD_WIDTH = 64  # of the softmax attention that ours is compared with


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape with its lengths, and what is measured on it."""

    name: str
    suite: str
    H: int = 4  # heads
    K: int = 128  # key channels of a head
    V: int = 256  # value channels of a head
    lengths: tuple[int, ...] = LENGTHS
    batch: int = 0  # sequences a call; 0: as many as there are tokens for
    gated: bool = True
    bidirectional: bool = False
    stateful: bool = False  # an initial state goes in, a final state comes out
    metrics: tuple[str, ...] = ("fwd", "fwdbwd", "memory", "error")
    baselines: tuple[str, ...] = ()
    first_call: tuple[int, ...] = ()  # lengths at which `first_call` is measured


ATTENTION = ("sdpa-flash", "sdpa-cudnn")
CASES = (
    Case(
        name="gla-340m",
        suite="gpu",
        lengths=SHORT + LENGTHS,
        metrics=("fwd", "fwdbwd", "memory", "error", "first_call"),
        baselines=("floor", "fla", *ATTENTION, "chunked"),
        first_call=(2048,),
    ),
    Case(name="gla-1.3b", suite="gpu", K=256, V=512, baselines=("floor", "fla", *ATTENTION)),
    Case(
        name="bigla-340m",
        suite="gpu",
        bidirectional=True,
        baselines=("floor", "flips", "causal"),
    ),
    Case(
        name="gla-340m-batch1",
        suite="gpu",
        lengths=SHORT,
        batch=1,
        metrics=("fwd", "fwdbwd", "fwd_wall", "fwdbwd_wall"),
        baselines=("fla", *ATTENTION),
    ),
    Case(
        name="decode-340m",
        suite="gpu",
        lengths=(1,),
        batch=64,
        stateful=True,
        metrics=("fwd", "fwd_wall", "fwd_graph"),
        baselines=("floor", "copy", "fla", "chunked"),
    ),
    Case(
        name="fig2",
        suite="gpu",
        H=16,
        K=64,
        V=64,
        lengths=(512, 1024, 2048, 4096, 8192),
        batch=32,
        gated=False,
        metrics=("fwd",),
        baselines=ATTENTION,
    ),
    Case(
        name="gla-340m-cpu",
        suite="cpu",
        lengths=CPU_LENGTHS,
        batch=1,
        metrics=("fwd", "fwdbwd", "error"),
        baselines=("naive", "sdpa"),
    ),
)


class Operator(NamedTuple):
    """Something to time: `call(*inputs)` is the output, inputs are differentiable."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...] = ()

    def forward(self) -> Tensor:
        """The output, without gradients."""
        with torch.no_grad():
            return self.call(*self.inputs)

    def gradients(self, do: Tensor) -> tuple[Tensor, ...]:
        """Output and input gradients, for the output gradient `do`."""
        o = self.call(*self.inputs)
        return (o.detach(), *torch.autograd.grad(o, self.inputs, do))


# --- inputs and methods ---------------------------------------------------------------------


def gate_names(case: Case) -> tuple[str, ...]:
    """Names of a case's gates, one for each direction."""
    return ("g_forward", "g_backward") if case.bidirectional else ("g",)


def gla_inputs(case: Case, batch: int, length: int, device: str) -> tuple[Tensor, ...]:
    """Random q, k, v (bfloat16 on a GPU) and float32 log gates as of an untrained model."""
    gen = torch.Generator(device).manual_seed(0)
    kind = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(width: int) -> Tensor:
        return torch.randn(batch, length, case.H, width, generator=gen, device=device)

    q, k, v = (normal(width).to(kind) for width in (case.K, case.K, case.V))
    if case.gated:
        gates = [F.logsigmoid(normal(case.K)) / 16 for _ in gate_names(case)]
    else:
        gates = [torch.zeros(batch, length, case.H, 1, device=device)]
    return tuple(x.requires_grad_() for x in (q, k, v, *gates))


def attention_inputs(case: Case, batch: int, length: int, device: str) -> tuple[Tensor, ...]:
    """q, k, v `[B, heads, T, 64]` whose total width is that of the case's values."""
    gen = torch.Generator(device).manual_seed(0)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (3, batch, length, case.H * case.V // HEAD_WIDTH, HEAD_WIDTH)
    x = torch.randn(shape, generator=gen, device=device).to(kind)
    return tuple(part.transpose(1, 2).requires_grad_() for part in x.unbind())


def gla_call(case: Case, backend: str) -> Callable[..., Tensor]:
    """Our operator; `backend` as in `gatebook.kernels.gla`."""
    if case.bidirectional:
        return lambda *x: output(kernels.bidirectional_gla(*x, backend=backend))
    return lambda *x: output(kernels.gla(*x, backend=backend))


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of an operator that may return a state as well."""
    return result if isinstance(result, Tensor) else result[0]


def flipped_call(backend: str) -> Callable[..., Tensor]:
    """Both directions by two causal calls, the second on flipped inputs; their mean."""

    def call(q: Tensor, k: Tensor, v: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        half = {"scale": q.shape[-1] ** -0.5 / 2, "backend": backend}
        turned = (x.flip(1) for x in (q, k, v, backward))
        return kernels.gla(q, k, v, forward, **half)[0] + kernels.gla(*turned, **half)[0].flip(1)

    return call


def fla_call(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """flash-linear-attention's chunkwise kernel."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, g)[0]


def attention_call(backend: SDPBackend | None) -> Callable[..., Tensor]:
    """torch's causal softmax attention; None leaves the choice of the kernel to torch."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


SDPA = {
    "sdpa": None,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


def operator(method: str, case: Case, length: int, options: argparse.Namespace) -> Operator:
    """A method with inputs of a case's shape."""
    batch = case.batch or max(1, options.tokens // length)
    if method == "copy":
        moved = bytes_moved(case, operator("ours", case, length, options))["fwd"]
        half = torch.zeros(moved // 4, dtype=torch.bfloat16, device=options.device)
        return Operator(Tensor.clone, (half,))
    if case.stateful:
        return step_operator(method, case, batch, options)
    if method in SDPA:
        inputs = attention_inputs(case, batch, length, options.device)
        return Operator(attention_call(SDPA[method]), inputs, ("q", "k", "v"))
    inputs = gla_inputs(case, batch, length, options.device)
    names = ("q", "k", "v", *gate_names(case))
    if method == "causal":
        return Operator(lambda *x: kernels.gla(*x, backend=options.backend)[0], inputs[:4], names)
    calls = {
        "ours": gla_call(case, options.backend),
        "fla": fla_call,
        "flips": flipped_call(options.backend),
    }
    return Operator(calls.get(method) or gla_call(case, method), inputs, names)


def step_operator(method: str, case: Case, batch: int, options: argparse.Namespace) -> Operator:
    """One token for each sequence: reads the states, writes them and the output."""
    inputs = gla_inputs(case, batch, 1, options.device)
    state = torch.randn(batch, case.H, case.K, case.V, device=options.device)
    if method == "fla":
        from fla.ops.gla import fused_recurrent_gla as run

        more = {}
    else:
        run, more = kernels.gla, {"backend": options.backend if method == "ours" else method}

    def call(*x: Tensor) -> Tensor:
        return run(*x[:4], initial_state=x[4], output_final_state=True, **more)[0]

    return Operator(call, (*inputs, state), ("q", "k", "v", "g", "initial_state"))


# --- measuring ------------------------------------------------------------------------------


@dataclass
class Session:
    """A run of one suite: what was measured, and where it is saved."""

    options: argparse.Namespace
    about: dict
    path: Path
    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bandwidth: float = 0.0  # bytes a second of a copy
    started: float = field(default_factory=time.perf_counter)

    def add(self, case: str, metric: str, T: int | None, method: str, value: float) -> None:
        """Keep one number and print it; one that is not finite counts as a failure."""
        if not abs(value) < float("inf"):
            self.fail(case, metric, T, method, f"the result is {value}")
            return
        self.records.append(Record(case=case, metric=metric, T=T, method=method, value=value))
        unit = records.unit(metric)
        where = f"{case:<16} T={T or '':<6} {metric:<11} {method:<10}"
        print(f"{where} {value:>10.4g} {unit:<8} [{self.elapsed():.1f} s]", flush=True)

    def fail(
        self, case: str, metric: str, T: int | None, method: str, why: Exception | str
    ) -> None:
        """Report what could not be measured."""
        kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
        words = kind + " ".join(str(why).split())[:200]
        self.failures.append(f"{case} T={T} {metric} {method}: {words}")
        print(f"failed: {self.failures[-1]}", flush=True)

    def save(self) -> None:
        """Write everything measured so far."""
        end = {"load_after": round(os.getloadavg()[0], 2), "seconds": round(self.elapsed(), 1)}
        records.write(self.path, self.about | end | {"failures": self.failures}, self.records)

    def elapsed(self) -> float:
        """Seconds since the suite began."""
        return time.perf_counter() - self.started


def milliseconds(call: Callable[[], object], options: argparse.Namespace) -> float:
    """Median time of a call, at least three calls on a CPU; on a GPU of its work there alone.

    A buffer larger than any cache is cleared before each call, so often that the GPU is still busy
    with it when the host has launched the call: `fwd_wall` is what includes launching.
    """
    call()
    seconds = options.seconds
    start = time.perf_counter()
    call()
    if options.device == "cpu":
        seconds = max(seconds, 3 * (time.perf_counter() - start))
        return measure.latency(call, device="cpu", min_seconds=seconds)
    calls = max(5, round(seconds / (1e-3 * BUSY + time.perf_counter() - start)))
    buffer = torch.empty(2**28, dtype=torch.int8, device=options.device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in marks:
        for _ in range(10 * BUSY):  # 0.1 ms each
            buffer.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def wall_milliseconds(call: Callable[[], object], device: str) -> float:
    """Time of a call when calls follow one another, launches included; the median of five rounds.

    Unlike in `milliseconds`, the GPU waits for the host where launching takes longer.
    """
    rounds, calls = [], 50 if device == "cuda" else 1
    for _ in range(6):
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronise(device)
        rounds.append((time.perf_counter() - start) / calls * 1000)
    return sorted(rounds[1:])[2]


def graph_milliseconds(op: Operator) -> float:
    """Time of a call among others on the GPU: `CALLS_IN_GRAPH` of them, or more if the L2 cache
    would still hold inputs when their turn comes again. What they give is kept until the end.
    """
    cache = torch.cuda.get_device_properties(op.inputs[0].device).L2_cache_size
    size = sum(x.numel() * x.element_size() for x in op.inputs)
    calls = max(CALLS_IN_GRAPH, -(-4 * cache // size))
    own = [[x.detach().clone() for x in op.inputs] for _ in range(calls)]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = [op.call(*inputs) for inputs in own]
    milliseconds = measure.latency(graph.replay, device="cuda", min_seconds=0.1) / calls
    del kept
    return milliseconds


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timings(op: Operator, metrics: Iterable[str], options: argparse.Namespace) -> Iterator[tuple]:
    """Pairs of metric and value: times and memory of one operator."""
    do = torch.randn_like(op.forward())

    def both() -> None:
        op.gradients(do)

    calls = {"fwd": op.forward, "fwdbwd": both}
    for metric in metrics:
        name, _, wall = metric.partition("_")
        if metric == "memory" and options.device == "cuda":
            both()
            yield metric, measure.peak_memory(both) / 2**20
        elif wall == "graph" and options.device == "cuda":
            yield metric, graph_milliseconds(op)
        elif name in calls and wall:
            yield metric, wall_milliseconds(calls[name], options.device)
        elif metric in calls:
            yield metric, milliseconds(calls[metric], options)


def time_method(session: Session, case: Case, T: int, method: str, metrics: list[str]) -> None:
    """Measure one method at one length. What fails is reported and the suite goes on."""
    metrics = [name for name in metrics if name not in ("error", "first_call")]
    if not metrics:
        return
    try:
        op = operator(method, case, T, session.options)
        for metric, value in timings(op, metrics, session.options):
            session.add(case.name, metric, T, method, value)
    except Exception as error:  # a baseline that is missing or does not fit must not end the run
        session.fail(case.name, ",".join(metrics), T, method, error)


def bytes_moved(case: Case, op: Operator) -> dict[str, int]:
    """What each pass reads and writes if it does so once."""
    size = [x.numel() * x.element_size() for x in op.inputs]
    o, state = size[2], size[-1] if case.stateful else 0
    forward = sum(size) + o + state
    return {"fwd": forward, "fwd_graph": forward, "fwdbwd": 3 * sum(size) + 2 * o}


def floor(session: Session, case: Case, T: int, metrics: list[str]) -> None:
    """Bytes that must move, over the copy bandwidth of this machine."""
    moved = bytes_moved(case, operator("ours", case, T, session.options))
    for metric in metrics:
        if metric in moved and session.bandwidth:
            session.add(case.name, metric, T, "floor", 1000 * moved[metric] / session.bandwidth)


def errors(session: Session, case: Case, T: int, methods: list[str]) -> None:
    """Relative RMS errors of output and gradients, for one sequence of T tokens."""
    inputs = gla_inputs(case, 1, T, session.options.device)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    reference = gla_call(case, "naive" if T <= LONGEST_EXACT else "chunked")
    do = torch.randn_like(inputs[2])
    wanted = Operator(reference, exact).gradients(do.double())
    for method in methods:
        try:
            op = operator(method, case, T, session.options)
            found = Operator(op.call, inputs, op.names).gradients(do)
        except Exception as error:
            session.fail(case.name, "error", T, method, error)
            continue
        pairs = zip(("o", *(f"d{name}" for name in op.names)), found, wanted, strict=True)
        sizes = {name: relative_error(x, y) for name, x, y in pairs}
        session.add(case.name, "error", T, method, max(sizes.values()))
        for name, value in sizes.items():
            session.add(case.name, f"error_{name}", T, method, value)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over the RMS of what is wanted."""
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def machine(session: Session) -> None:
    """Copy bandwidth and the rate of a bfloat16 matrix product, measured in the same run."""
    options = session.options
    elements, side = (2**29, 8192) if options.device == "cuda" else (2**22, 256)
    x = torch.zeros(elements, dtype=torch.bfloat16, device=options.device)
    y = torch.empty_like(x)
    session.bandwidth = 4 * elements / milliseconds(lambda: y.copy_(x), options) * 1000
    session.add("machine", "copy", None, "ours", session.bandwidth / 1e9)
    a, b = torch.randn(2, side, side, device=options.device).bfloat16()
    rate = 2 * side**3 / milliseconds(lambda: a @ b, options) / 1e9
    session.add("machine", "matmul", None, "ours", rate)


def measure_case(session: Session, case: Case) -> None:
    """Everything of one case, length by length; saves after each."""
    options, start = session.options, session.elapsed()
    metrics = [metric for metric in case.metrics if metric in options.metrics]
    for T in chosen(case.lengths, options.lengths):
        methods = ["ours", *(name for name in case.baselines if is_wanted(name, case, T, options))]
        for method in methods:
            if method == "floor":
                floor(session, case, T, metrics)
            else:
                time_method(session, case, T, method, metrics)
        if "error" in metrics:
            computed = ("ours", "fla", "chunked", "naive")
            errors(session, case, T, [name for name in methods if name in computed])
        session.save()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(f"{case.name}: {session.elapsed() - start:.1f} s", flush=True)


def is_wanted(method: str, case: Case, T: int, options: argparse.Namespace) -> bool:
    """Whether a baseline was asked for at this length."""
    if method == "fla" and options.fla_lengths:
        return method in options.baselines and T in options.fla_lengths
    if method == "naive" and T > LONGEST_NAIVE:
        return False
    return method in options.baselines


def chosen(lengths: tuple[int, ...], asked: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of a case that were asked for; all of them if none was named."""
    return tuple(T for T in lengths if T in asked) if asked else lengths


# --- the first call -------------------------------------------------------------------------


def first_calls(session: Session, case: Case) -> None:
    """Seconds of the first forward + backward, each in a new process without compiled kernels."""
    options = session.options
    if "first_call" not in case.metrics or "first_call" not in options.metrics:
        return
    for T in chosen(case.first_call, options.lengths):
        for method in options.first_call:
            cache = tempfile.mkdtemp(prefix="triton-", dir=options.scratch)
            command = [sys.executable, str(HERE), "gpu", "--child", method, "--cases", case.name]
            command += ["--lengths", str(T), "--device", options.device]
            command += ["--tokens", str(options.tokens), "--backend", options.backend]
            env = os.environ | {"TRITON_CACHE_DIR": cache}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no message"])[-1]
                session.fail(case.name, "first_call", T, method, why)
                continue
            seconds = float(done.stdout.split()[-1])  # packages may print before it
            session.add(case.name, "first_call", T, method, seconds)


def child(options: argparse.Namespace) -> None:
    """What the new process does: one forward + backward, timed from after the imports."""
    case = next(case for case in CASES if case.name in options.cases)
    if options.child == "fla":
        import fla.ops.gla  # noqa: F401 - the import is not timed
    op = operator(options.child, case, options.lengths[0], options)
    do = torch.randn_like(op.inputs[2])
    _synchronise(options.device)
    start = time.perf_counter()
    op.gradients(do)
    _synchronise(options.device)
    print(time.perf_counter() - start)


# --- the command ----------------------------------------------------------------------------


def about(suite: str, options: argparse.Namespace) -> dict:
    """What a results file says beside its records."""
    return {
        "suite": suite,
        "device": options.device,
        "hardware": provenance.hardware_line(provenance.hardware(options.device)),
        "machine": provenance.hardware(options.device),
        "versions": provenance.versions() | _version("flash-linear-attention"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(options.words),
        "commit": provenance.git_commit(HERE.parents[1]),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),  # of this machine; a run of its own adds 1
        "tokens": options.tokens,
        "backend": options.backend,
    }


def command_line(words: list[str]) -> str:
    """The command without the place of its results file, which is a matter of the machine."""
    at = words.index("--out") if "--out" in words else len(words)
    return shlex.join(["python", "benchmarks/kernels.py", *words[:at], *words[at + 2 :]])


def _version(package: str) -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}


def run_suite(suite: str, options: argparse.Namespace) -> Session:
    """Measure a suite's cases in their order."""
    path = Path(options.out) if options.out else RESULTS / f"{suite}.json"
    session = Session(options, about(suite, options), path)
    print(f"{suite}: {session.about['hardware']}, torch {torch.__version__}", flush=True)
    cases = [
        c for c in CASES if c.suite == suite and (not options.cases or c.name in options.cases)
    ]
    for case in cases:
        first_calls(session, case)
    if suite == "gpu":
        machine(session)
    for case in cases:
        measure_case(session, case)
    session.save()
    missing = f", {len(session.failures)} not measured (see above)" if session.failures else ""
    print(f"written: {path}, {session.elapsed():.0f} s{missing}")
    return session


def summarise_cpu(session: Session) -> None:
    """The requirement on the chunkwise form, and where it overtakes softmax attention."""

    def times(metric: str, method: str) -> dict[int, float]:
        found = (r for r in session.records if (r.metric, r.method) == (metric, method))
        return {record.T or 0: record.value for record in found}

    ours, naive = times("fwdbwd", "ours"), times("fwdbwd", "naive")
    if LONGEST_NAIVE in naive and LONGEST_NAIVE in ours:
        print(
            f"against the recurrence, forward + backward, T = {LONGEST_NAIVE}: target {TARGET}x, "
            f"measured {naive[LONGEST_NAIVE] / ours[LONGEST_NAIVE]:.1f}x"
        )
    for metric in ("fwd", "fwdbwd"):
        where = records.faster_from(times(metric, "ours"), times(metric, "sdpa"))
        print(f"{metric}: faster than softmax attention {where}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _names(text))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cases = ", ".join(case.name for case in CASES)
    words = argparse.ArgumentParser(
        prog="benchmarks/kernels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = words.add_argument
    add("suite", choices=("cpu", "gpu", "all"), help="what to measure")
    add("--cases", type=_names, default=(), help=f"only these, from: {cases}")
    add("--lengths", type=_numbers, default=(), help="only these lengths T, such as 1024,2048")
    add("--metrics", type=_names, default=METRICS, help=f"only these, from: {', '.join(METRICS)}")
    add(
        "--baselines",
        type=_names,
        default=BASELINES,
        help=f"only these, from: fla, {', '.join(BASELINES)}; or all (default: all but fla)",
    )
    add("--fla-lengths", type=_numbers, default=(), help="lengths at which fla is measured")
    add("--first-call", type=_names, default=("ours",), help="methods of first_call: ours,fla")
    add("--tokens", type=int, default=32768, help="tokens a call (default 32768)")
    add("--seconds", type=float, help="time for each number (default: 0.2 on a GPU, 1 on a CPU)")
    add("--device", choices=("cuda", "cpu"), help="default: what the suite is for")
    add("--backend", default="", help="of ours; default: triton on a GPU, auto on a CPU")
    add("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's own choice")
    add("--out", default="", help="results file; default: benchmarks/results/SUITE.json")
    add("--child", default="", help=argparse.SUPPRESS)
    return words


def checked(options: argparse.Namespace, words: argparse.ArgumentParser) -> argparse.Namespace:
    """Refuse names that do not exist, before anything is measured."""
    if options.baselines == ("all",):
        options.baselines = (*BASELINES, "fla")
    known = {
        "cases": [case.name for case in CASES],
        "metrics": METRICS,
        "baselines": (*BASELINES, "fla"),
        "first_call": ("ours", "fla"),
    }
    for name, allowed in known.items():
        wrong = [word for word in getattr(options, name) if word not in allowed]
        if wrong:
            words.error(f"unknown {name} {', '.join(wrong)}; allowed: {', '.join(allowed)}")
    if options.suite == "all" and options.out:
        words.error("--out names one file; run the suites one after the other")
    return options


def for_suite(suite: str, options: argparse.Namespace) -> argparse.Namespace:
    """The options with the defaults that depend on the suite."""
    device = options.device or ("cuda" if suite == "gpu" else "cpu")
    backend = options.backend or ("triton" if device == "cuda" else "auto")
    seconds = options.seconds or SECONDS[device]
    found = {"device": device, "backend": backend, "seconds": seconds}
    return argparse.Namespace(**vars(options) | found)


def main(words: list[str] | None = None) -> int:
    """Run what was asked for.

    Returns:
        0, or 1 if one of our own methods could not be measured.
    """
    found = parser()
    options = checked(found.parse_args(words), found)
    options.words = sys.argv[1:] if words is None else words
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        child(for_suite(options.suite, options))
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as options.scratch:
        for suite in ("cpu", "gpu") if options.suite == "all" else (options.suite,):
            session = run_suite(suite, for_suite(suite, options))
            if suite == "cpu":
                summarise_cpu(session)
            failed |= any(" ours: " in name for name in session.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
