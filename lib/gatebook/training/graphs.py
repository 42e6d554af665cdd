"""CUDA graphs: a small model's forward and backward pass without the cost of launching kernels."""

import torch
from torch import Tensor, nn


def capture(model: nn.Module, sample: Tensor, precision: str = "fp32") -> None:
    """Make the model's training passes replay CUDA graphs; call it before `fit`.

    Evaluation, and inputs while `model.training` is false, take the usual path. While training,
    every batch must have the sample's shape.

    Args:
        model: On a CUDA device, in place.
        sample: Any input batch of the shape that training uses, on the same device.
        precision: `fp32`, or `bf16` for autocast, as in the recipe.

    Raises:
        ValueError: The sample is not on a CUDA device.
    """
    if not sample.is_cuda:
        raise ValueError(f"CUDA graphs need a CUDA device, the sample is on {sample.device}")
    model.to(sample.device).train()
    autocast = torch.autocast(
        "cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )
    with autocast:
        torch.cuda.make_graphed_callables(model, (sample,))
