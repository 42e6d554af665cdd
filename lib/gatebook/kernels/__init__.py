"""Operators on raw tensors, each with a naive form that serves as its oracle.

Layout: `[B, T, H, D]` (batch, time, heads, channels). Gates are natural-log gates.
"""

from gatebook.kernels.attention import naive_softmax_attention, softmax_attention
from gatebook.kernels.gated_linear_attention import gla

__all__ = ["gla", "naive_softmax_attention", "softmax_attention"]
