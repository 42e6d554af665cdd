"""Operators on raw tensors, each with a naive form that serves as its oracle.

Layout: `[B, T, H, D]` (batch, time, heads, channels). Gates are natural-log gates.
"""

from gatebook.kernels.attention import naive_softmax_attention, softmax_attention
from gatebook.kernels.delta_rule import delta_rule
from gatebook.kernels.gated_linear_attention import gla
from gatebook.kernels.gated_linear_attention.bidirectional import bidirectional_gla
from gatebook.kernels.scan import linear_scan

__all__ = [
    "bidirectional_gla",
    "delta_rule",
    "gla",
    "linear_scan",
    "naive_softmax_attention",
    "softmax_attention",
]
