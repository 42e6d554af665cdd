"""One model on one process or on many: DDP, FSDP2, activation checkpointing, compilation."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gatebook.errors import unknown

STRATEGIES = ("ddp", "fsdp")


def blocks(model: nn.Module) -> list[nn.Module]:
    """What a model repeats, the unit of sharding, recomputation and compilation: the members of its
    module lists, and of sequences in them; the model itself if it has none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for parts in lists for part in parts for block in _flat(part)]
    inner = {id(x) for block in found for x in block.modules() if x is not block}
    return [block for block in dict.fromkeys(found) if id(block) not in inner] or [model]


def _flat(part: nn.Module) -> list[nn.Module]:
    if isinstance(part, nn.ModuleList | nn.Sequential):
        return [block for inner in part for block in _flat(inner)]
    return [part]


def recompute(model: nn.Module) -> None:
    """Make every block keep its inputs alone and compute the rest again in the backward pass."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def keep_activations(model: nn.Module) -> None:
    """Undo `recompute`."""
    for block in blocks(model):
        vars(block).pop("forward", None)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread parameters, gradients and optimiser state over all processes, block by block.

    Raises:
        ValueError: There is one process only, without a process group.
    """
    if not dist.is_initialized():
        raise ValueError('strategy="fsdp" needs a launcher such as torchrun; use "ddp" without')
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    if not isinstance(model, FSDPModule):
        fully_shard(model, mesh=mesh)
    return model


def distribute(
    model: nn.Module, accelerator: Any, strategy: str, *, compile: bool, recomputed: bool
) -> nn.Module:
    """The model on its device, ready to be trained by this process among the others.

    Args:
        model: Changed in place.
        accelerator: Accelerate's; it says which device is this process's own.
        strategy: "ddp" keeps a copy on every process, "fsdp" a part of it.
        compile: Whether to compile its blocks with `torch.compile`.
        recomputed: Whether its blocks keep their inputs only.

    Raises:
        ValueError: An unknown strategy, or FSDP without a launcher.
    """
    if strategy not in STRATEGIES:
        raise ValueError(unknown("strategy", strategy, STRATEGIES))
    model = model.to(accelerator.device)
    if recomputed:
        recompute(model)
    if compile:
        for block in blocks(model):
            block.compile()
    return shard(model, accelerator.device) if strategy == "fsdp" else model


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager:
    """Exchange gradients in the last of several accumulated batches only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers on the CPU; with FSDP every process calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    return mean(torch.tensor(float(flag), device=device)).item() > 0


def whole(x: Tensor | None) -> Tensor | None:
    """A sharded number, such as a gradient norm, as a plain tensor."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
