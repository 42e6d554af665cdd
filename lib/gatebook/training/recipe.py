"""`Recipe`: how to train, and the optimiser that it asks for."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from gatebook.errors import unknown

SCHEDULES = ("constant", "cosine", "onecycle")
OPTIMIZERS = ("adamw", "adam")
PRECISIONS = {"fp32": "no", "bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: optimiser, schedule, precision.

    Raises:
        ValueError: for an unknown schedule, optimiser or precision, or a step count below 1.
    """

    steps: int  # optimiser steps
    lr: float  # peak learning rate
    schedule: str = "cosine"  # constant, cosine or onecycle, after a linear warm-up
    warmup_steps: int = 0  # linear warm-up from 0 (constant and cosine)
    final_lr: float = 0.0  # learning rate that the cosine ends at
    optimizer: str = "adamw"  # adamw or adam
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01  # decoupled for adamw, L2 for adam
    decay_1d: bool = False  # also decay biases, norms and other one-dimensional parameters
    clip_norm: float | None = 1.0  # largest gradient norm; None switches clipping off
    precision: str = "fp32"  # fp32 or bf16 (autocast)
    accumulate: int = 1  # batches for each optimiser step

    def __post_init__(self) -> None:
        for kind, value, allowed in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise ValueError(unknown(kind, value, allowed))
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(f"steps and accumulate are at least 1, got {self}")

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if self.schedule == "onecycle":  # rise for 30 % of the steps, then fall; both are cosines
            rise = max(1, round(0.3 * self.steps))
            if step < rise:
                return self._between(self.lr / 25, self.lr, step / rise)
            return self._between(self.lr, self.lr / 25e4, (step - rise) / (self.steps - rise))
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        left = max(1, self.steps - self.warmup_steps)
        return self._between(self.lr, self.final_lr, (step - self.warmup_steps) / left)

    @staticmethod
    def _between(start: float, end: float, fraction: float) -> float:
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser. Weight decay spares one-dimensional parameters (unless `decay_1d`)
    and those that the model names in `no_weight_decay()`."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        keeps = (parameter.ndim > 1 or recipe.decay_1d) and name not in spared
        (decay if keeps else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=recipe.lr, betas=recipe.betas, fused=fused or None)
