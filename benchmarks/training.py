"""Training steps of whole models: GLA-340M of this book, flash-linear-attention's, and a Llama.

    python benchmarks/training.py                          all, on one GPU
    python benchmarks/training.py --methods ours,llama     without fla, which compiles for minutes
    python benchmarks/training.py --device cpu --layers 1 --width 64 --tokens 64 --lengths 32

A step is forward, backward, gradient clipping and fused AdamW, under bf16 autocast on a GPU, on
random tokens. Each number is printed and saved when it is measured; a method that fails is
reported and left out.

case        gla-340m-training
metrics     step        median ms of a step
            memory      MiB: peak of a step, model and optimiser included
methods     ours, ours-compiled (blocks through torch.compile), fla (`GLAForCausalLM` with its fused
            norms, SwiGLU and cross-entropy, as it comes), llama and llama-compiled (the same
            decoder with softmax attention: 16 heads of 64, torch's scaled_dot_product_attention)
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatebook import convert, models
from gatebook.evidence import provenance
from gatebook.measure import records
from gatebook.measure.records import Record
from gatebook.measure.sequence import sequence_loss
from gatebook.training import parallel

CASE = "gla-340m-training"
METHODS = ("ours", "ours-compiled", "llama", "llama-compiled", "fla")
Loss = Callable[[nn.Module, Tensor], Tensor]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of our models; tokens `[B, T + 1]`."""
    return sequence_loss(model, (tokens[:, :-1], tokens[:, 1:]))


def build(method: str, options: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """A model with fresh weights and its loss."""
    config = models.config("gla_340m", d_model=options.width, n_layers=options.layers)
    if method == "fla":
        from fla.models import GLAConfig, GLAForCausalLM

        model = GLAForCausalLM(GLAConfig(**convert.fla_config(config))).to(options.device)
        return model, lambda model, tokens: model(input_ids=tokens, labels=tokens).loss
    if method.startswith("llama"):
        config = replace(config, mixer="attention", n_heads=max(1, options.width // 64))
    model = models.create("gla_340m", **vars(config)).to(options.device)
    if method.endswith("compiled"):
        for block in parallel.blocks(model):
            block.compile()
    return model, next_token_loss


def measured(method: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a step, and on a GPU the peak memory in MiB."""
    torch.manual_seed(0)
    model, loss = build(method, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = max(1, options.tokens // length)
    extra = 0 if method == "fla" else 1  # fla shifts the labels itself
    tokens = torch.randint(model.config.vocab_size, (rows, length + extra), device=options.device)
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=cuda):
            value = loss(model, tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for number in range(options.warmup + options.steps):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if number >= options.warmup:
            times.append(1000 * (time.perf_counter() - start))
    found = {"step": statistics.median(times)}
    if cuda:
        found["memory"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def main(words: list[str] | None = None) -> int:
    """Measure what was asked for.

    Returns:
        0, or 1 if one of our own models could not be measured.
    """
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--lengths", default="2048,8192,16384", help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a batch")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=24, help="blocks")
    parser.add_argument("--width", type=int, default=1024, help="of the model")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--out", type=Path, default=here / "results" / "training.json")
    options = parser.parse_args(words)
    methods = options.methods.split(",")
    for name in methods:
        if name not in METHODS:
            parser.error(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the script")
    command = " ".join(["python benchmarks/training.py", *map(shlex.quote, words or sys.argv[1:])])
    about: dict[str, Any] = {
        "suite": "training",
        "device": options.device,
        "hardware": provenance.hardware_line(provenance.hardware(options.device)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "command": command,
        "commit": provenance.git_commit(provenance.root()),
        "tokens": options.tokens,
    }
    found: list[Record] = []
    failures: list[str] = []
    for length in map(int, options.lengths.split(",")):
        for method in methods:
            torch._dynamo.reset()
            try:
                numbers = measured(method, length, options)
            except Exception as error:
                failures.append(f"{method} at {length}: {type(error).__name__}: {error}"[:300])
                print(f"T={length:<6} {method:<15} failed: {failures[-1]}", flush=True)
                continue
            finally:
                if options.device == "cuda":
                    torch.cuda.empty_cache()
            speed = options.tokens // length * length / numbers["step"] * 1000
            words_ = ", ".join(f"{k} {v:,.1f} {records.unit(k)}" for k, v in numbers.items())
            print(f"T={length:<6} {method:<15} {words_}, {speed:,.0f} tokens/s", flush=True)
            found += [
                Record(case=CASE, metric=k, T=length, method=method, value=v)
                for k, v in numbers.items()
            ]
            records.write(options.out, about | {"failures": failures}, found)
    return int(any(name.startswith("ours") for name in failures))


if __name__ == "__main__":
    sys.exit(main())
