"""Losses of models that answer token by token."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100  # the target that `torch.nn.functional.cross_entropy` leaves out


def sequence_loss(
    model: nn.Module, batch: tuple[Tensor, Tensor], classes: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not `IGNORE`.

    Args:
        model: Maps token ids `[B, T]` to logits `[B, T, N]`.
        batch: Token ids and targets, both `[B, T]`.
        classes: The answers are the first `classes` tokens; None allows all.
    """
    tokens, targets = batch
    logits = model(tokens)[..., :classes].float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """What modules add to the loss of a task: the mean of their `auxiliary_loss`, 0 if none has it.

    A module sets it in its forward pass, so call this after the model. A function that stands in
    for a model has no modules, and adds nothing.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module.auxiliary_loss for module in modules if hasattr(module, "auxiliary_loss")]
    return sum(found) / len(found) if found else 0.0


@torch.no_grad()
def loss_by_position(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int | None = None
) -> Tensor:
    """Mean cross-entropy at each position, over all sequences, in nats.

    Args:
        model: Maps token ids `[B, T]` to logits `[B, T, N]`; inputs go to its device.
        batches: Pairs of token ids and targets, all of one length T.
        classes: As for `sequence_loss`.

    Returns:
        `[T]`, float32, on the CPU; NaN where every target is `IGNORE`.
    """
    device = next(model.parameters()).device
    total = count = torch.zeros(())
    for tokens, targets in batches:
        logits = model(tokens.to(device))[..., :classes].float().mT  # (B, N, T)
        losses = F.cross_entropy(logits, targets.to(device), reduction="none").cpu()
        total = total + losses.sum(0)
        count = count + (targets.cpu() != IGNORE).sum(0)
    return total / count
