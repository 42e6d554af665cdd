"""Parameters, floating-point operations, latency and peak memory of a module or function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def parameters(model: nn.Module, *, without: tuple[str, ...] = ()) -> int:
    """Number of parameters, shared ones counted once.

    Args:
        model: may be on the meta device.
        without: prefixes of parameter names to leave out, such as `("embedding", "head")`.
    """
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without))


def flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in a call.

    Counted by torch's `FlopCounterMode`, two for each multiply-add; element-wise work does not
    count, and attention counts as if it were not causal. Inputs and weights may be on the meta
    device. Papers that print "FLOPs" usually mean
    multiply-adds: halve this number.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: list[int], k: list[int], v: list[int], *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch leaves it out
    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: attention})
    with counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


def latency(function: Callable[[], Any], *, device: str = "cpu", min_seconds: float = 0.2) -> float:
    """Median time of a call in milliseconds, after a warm-up.

    On a GPU by Triton's `do_bench` (device events, cache flushed); elsewhere by
    `torch.utils.benchmark`, with the threads that torch is set to use.
    """
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return float(do_bench(function, rep=round(1000 * min_seconds), return_mode="median"))
    from torch.utils.benchmark import Timer

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    function()
    return timer.blocked_autorange(min_run_time=min_seconds).median * 1000


def training_latency(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    device: str = "cpu",
    precision: str = "fp32",
    min_seconds: float = 0.2,
) -> float:
    """Median time of a forward and a backward pass in milliseconds.

    Args:
        model: On the device; its gradients are dropped after each pass.
        batch: On the device.
        loss: Of the model and the batch, a scalar.
        device: Where both are.
        precision: "fp32", or "bf16" for autocast.
        min_seconds: Of the measurement.
    """

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model, batch)
        value.backward()
        model.zero_grad()

    return latency(step, device=device, min_seconds=min_seconds)


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of GPU memory that a call adds at its peak to what was allocated before.

    Raises:
        RuntimeError: there is no CUDA device; host memory has no such counter.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("peak_memory needs a CUDA device")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
