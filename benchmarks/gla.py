"""Chunkwise gated linear attention against the naive recurrence, on the CPU.

    python benchmarks/gla.py

One sequence of 2048 tokens with the heads of the 340M model (H = 4, K = 128, V = 256), float32,
forward and backward. Prints a table and writes benchmarks/results/gla-cpu.json.
"""

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gatebook.evidence import provenance
from gatebook.kernels import gla

HEADS, KEYS, VALUES = 4, 128, 256
FORMS = {
    "naive recurrence": {"backend": "naive"},
    "chunkwise, C = 32": {"chunk_size": 32},
    "chunkwise, C = 64": {"chunk_size": 64},
    "chunkwise, C = 128": {"chunk_size": 128},
}
TARGET = 20  # times faster than the recurrence, forward and backward


def inputs(length: int) -> list[Tensor]:
    """Random q, k, v and log-gates of the size that an untrained 340M model has."""
    gen = torch.Generator().manual_seed(0)

    def normal(width: int) -> Tensor:
        return torch.randn(1, length, HEADS, width, generator=gen)

    g = F.logsigmoid(normal(KEYS)) / 16
    return [x.requires_grad_() for x in (normal(KEYS), normal(KEYS), normal(VALUES), g)]


def seconds(tensors: list[Tensor], options: dict, repeats: int) -> tuple[float, float]:
    """Median time of the forward pass, and of forward and backward together, after a warm-up."""
    forward, both = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        o, _ = gla(*tensors, **options)
        forward.append(time.perf_counter() - start)
        torch.autograd.grad(o.sum(), tensors)
        both.append(time.perf_counter() - start)
    return statistics.median(forward[1:]), statistics.median(both[1:])


def main() -> None:
    """Time every form, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens (default 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default 3)")
    parser.add_argument("--threads", type=int, default=0, help="0 keeps torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tensors = inputs(options.length)
    exact = gla(*(x.double() for x in tensors), backend="naive")[0].detach()
    rows, base = [], 0.0
    head = "form                  forward [ms]  + backward [ms]  speed-up  error vs float64"
    print(f"T = {options.length}, {torch.get_num_threads()} thread(s)\n{head}")
    for name, form in FORMS.items():
        forward, both = seconds(tensors, form, options.repeats)
        base = base or both
        error = gla(*tensors, **form)[0].detach().double().sub(exact).norm() / exact.norm()
        rows.append(
            {
                "form": name,
                "forward_ms": round(1000 * forward, 2),
                "forward_backward_ms": round(1000 * both, 2),
                "speed_up": round(base / both, 1),
                "relative_error": float(f"{error:.2e}"),
            }
        )
        print("{:<20}  {:>12.1f}  {:>15.1f}  {:>7.1f}x  {:>16.1e}".format(*rows[-1].values()))
    default = next(row for row in rows if row["form"] == "chunkwise, C = 64")
    print(f"target: {TARGET}x at C = 64; measured: {default['speed_up']}x")
    record(options.length, rows)


def record(length: int, rows: list[dict]) -> None:
    """Write the numbers with what they were measured on."""
    path = Path(__file__).parent / "results" / "gla-cpu.json"
    path.parent.mkdir(exist_ok=True)
    found = {
        "length": length,
        "heads": HEADS,
        "key_channels": KEYS,
        "value_channels": VALUES,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hardware": provenance.hardware("cpu"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
