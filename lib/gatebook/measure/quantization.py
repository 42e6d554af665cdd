"""Post-training quantisation of a whole model, simulated: static ranges, one for each tensor.

The scheme of Bondarenko et al. (2023): weights symmetric, activations asymmetric, with ranges from
a few calibration batches. Numbers are rounded to the grid and stay floating-point.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.9  # of a running range
CANDIDATES = 100  # clipping points that the search for the least squared error tries


def quantize_symmetric(x: Tensor, bits: int, *, search: bool = False) -> Tensor:
    """Rounds to Δ {−2^(b−1), …, 2^(b−1) − 1}, Δ = m / (2^(b−1) − 1), with m = max |x|.

    Args:
        x: Any shape.
        bits: b ≥ 2.
        search: Take for m that one of `CANDIDATES` fractions of max |x| that has the least squared
            error.

    Raises:
        ValueError: Fewer than two bits.
    """
    levels = 2 ** (_checked(bits) - 1) - 1
    largest = x.abs().max()
    if largest == 0:
        return x.clone()
    fractions = torch.arange(1, CANDIDATES + 1) / CANDIDATES if search else torch.ones(1)
    best, least = x, float("inf")
    for fraction in fractions.tolist():
        step = fraction * largest / levels
        rounded = (x / step).round().clamp(-levels - 1, levels) * step
        error = (rounded - x).square().sum().item()
        if error <= least:
            best, least = rounded, error
    return best


def quantize_affine(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Rounds to Δ (n − z), n = 0 … 2^b − 1, Δ = (high − low) / (2^b − 1), z = round(−low / Δ).

    Args:
        x: Any shape. Numbers outside the range are clipped.
        low: Lower end; the range is widened to hold zero.
        high: Upper end.
        bits: b ≥ 2.

    Raises:
        ValueError: Fewer than two bits.
    """
    levels = 2 ** _checked(bits) - 1
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return torch.zeros_like(x)
    step = (high - low) / levels
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, levels).sub(zero).mul(step)


class RunningRange:
    """Running least and largest number of the batches of a tensor, with momentum 0.9."""

    def __init__(self, percentile: float = 100.0) -> None:
        """Starts empty.

        Args:
            percentile: Above 50. What counts as largest in a batch, in per cent, and by symmetry as
                least; 100 takes the extremes.
        """
        self.percentile, self.low, self.high = percentile, None, None

    def update(self, x: Tensor) -> None:
        """Takes in a batch. Infinite numbers, such as masked scores, do not count."""
        x = x.flatten().float()
        if not x.isfinite().all():
            x = x[x.isfinite()]
        if self.percentile < 100:
            rank = max(1, round(x.numel() * self.percentile / 100))
            high, low = x.kthvalue(rank).values, -(-x).kthvalue(rank).values
        else:
            low, high = x.aminmax()
        low, high = low.item(), high.item()
        if self.low is None:
            self.low, self.high = low, high
        self.low = MOMENTUM * self.low + (1 - MOMENTUM) * low
        self.high = MOMENTUM * self.high + (1 - MOMENTUM) * high


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bits: int,
    skip: tuple[str, ...],
    search_weights: bool = False,
    percentile: float = 100.0,
    call: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> nn.Module:
    """A copy of a model with rounded weights and activations, as W8A8 with `bits=8`.

    The weight of every leaf module is rounded, and what every leaf module but dropout returns; a
    model makes a tensor seen by passing it through an `nn.Identity`. Biases are left, as hardware
    adds them to wide accumulators.

    Args:
        model: In evaluation mode from here on in the copy; left alone itself.
        batches: For calibration; the paper takes 16.
        bits: Of weights and activations.
        skip: Names; a module whose path has one of them stays as it is, such as "head".
        search_weights: Clip weights where that lessens the squared error, as for OPT.
        percentile: Of `RunningRange`, 99.999 for OPT.
        call: How to call the model on a batch.

    Returns:
        The copy. Weights that a skipped module shares with another are no longer shared.

    Raises:
        ValueError: A leaf module that calibration never called, or no batches.
    """
    copied = copy.deepcopy(model).eval()
    leaves = {
        name: module
        for name, module in copied.named_modules()
        if name and not list(module.children()) and not isinstance(module, nn.ParameterList)
    }
    kept = {name for name in leaves if set(name.split(".")) & set(skip)}
    for name in kept:
        for label, parameter in list(leaves[name].named_parameters(recurse=False)):
            setattr(leaves[name], label, nn.Parameter(parameter.clone()))
    rounded = {name: module for name, module in leaves.items() if name not in kept}
    points = {name: m for name, m in rounded.items() if not isinstance(m, nn.Dropout)}
    for module in rounded.values():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.data = quantize_symmetric(module.weight, bits, search=search_weights)
    ranges = {name: RunningRange(percentile) for name in points}
    hooks = [
        module.register_forward_hook(partial(_watch, ranges[name]))
        for name, module in points.items()
    ]
    for batch in batches:
        call(copied, batch)
    for hook in hooks:
        hook.remove()
    if unseen := [name for name, found in ranges.items() if found.low is None]:
        raise ValueError(f"calibration saw no output of {', '.join(unseen[:4])}: pass batches")
    for name, module in points.items():
        module.register_forward_hook(partial(_round, ranges[name], bits))
    return copied


def _watch(found: RunningRange, module: nn.Module, inputs: Any, output: Tensor) -> None:
    found.update(output)


def _round(
    found: RunningRange, bits: int, module: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    return quantize_affine(output, found.low, found.high, bits)


def _checked(bits: int) -> int:
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
    return bits
