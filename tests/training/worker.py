"""Trains a small language model as one of several processes; the tests start it.

    python worker.py FOLDER OUT --steps 20 [--strategy fsdp] [--resume] [--every 5] [--scale-batch]

Writes the losses to OUT on the first process. The global batch is 12 sequences on any number of
processes.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook import models
from gatebook.data.sharded import Deal, ShardedBatches
from gatebook.training import Recipe, fit, tasks

SIZE = {"vocab_size": 31, "d_model": 32, "n_layers": 2, "n_heads": 2}


def rows() -> Tensor:
    """Sequences of 17 tokens that count up by a step of their own."""
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randint(31, (2, 200, 1), generator=generator)
    return (start + step * torch.arange(17)) % 31


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Next-token prediction."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(folder: Path, steps: int, **options) -> list[float]:
    """The losses of the steps of this call."""
    torch.manual_seed(0)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _, parts = tasks.divide(6, 2, processes, largest=3)  # at least two batches a step
    data = ShardedBatches(rows(), Deal(200, 12, 0, rank=rank, processes=processes), parts=parts)
    recipe = Recipe(steps=steps, lr=3e-3, schedule="constant", warmup_steps=3, accumulate=parts)
    model = models.create("gla_340m", **SIZE, gate_rank=4)
    return fit(model, data, loss, recipe, checkpoint_dir=folder, **options).loss


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("folder", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--steps", type=int, default=20)
    words.add_argument("--strategy", default="ddp")
    words.add_argument("--resume", action="store_true")
    words.add_argument("--recompute", action="store_true")
    words.add_argument("--every", type=int, default=0)
    given = words.parse_args()
    torch.set_num_threads(1)
    found = train(
        given.folder,
        given.steps,
        strategy=given.strategy,
        resume=given.resume,
        recompute=given.recompute,
        checkpoint_every=given.every,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        given.out.write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
