"""Counting and timing: parameters, FLOPs, memory, latency. Thin, on torch's own tools."""

from gatebook.measure.cost import (
    flops,
    latency,
    parameters,
    peak_memory,
    training_latency,
)

__all__ = ["flops", "latency", "parameters", "peak_memory", "training_latency"]
