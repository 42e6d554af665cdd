"""Mamba-2's mixer (Dao and Gu 2024, arXiv 2405.21060), on the operator of gated linear attention.

With the step size Δ_t = softplus(dt_t + b) of each head: S_t = e^(−Δ_t A) S_{t-1} + Δ_t B_tᵀ x_t,
y_t = C_t S_t + D x_t. So B is the key, C the query, and the gate a scalar; B and C are shared by
all heads. Written from recollection of the published layer: one group, a convolution over 4 tokens
with SiLU before x, B and C, and RMSNorm(y ⊙ SiLU(z)) before the last map.

Shapes: B batch, T tokens, D model width, I = 2 D inner width, H heads of P = I / H, N state.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.kernels import gla
from gatebook.layers.language import RMSNorm, ShortConv


class Mamba2(nn.Module):
    """The layer, with a state of N × P for each head."""

    def __init__(self, d_model: int, d_head: int = 64, d_state: int = 64) -> None:
        super().__init__()
        inner = 2 * d_model
        self.n_heads, self.d_head = inner // d_head, d_head
        self.widths = (inner, inner + 2 * d_state, self.n_heads)  # z; x, B and C; dt
        self.split = (inner, d_state, d_state)
        self.maps = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConv(inner + 2 * d_state, 4)
        self.log_rate = nn.Parameter(torch.empty(self.n_heads))  # log A
        self.step_bias = nn.Parameter(torch.empty(self.n_heads))  # b
        self.skip = nn.Parameter(torch.ones(self.n_heads, 1))  # D
        self.norm = RMSNorm(inner, eps=1e-5)
        self.out = nn.Linear(inner, d_model, bias=False)
        self.reset()

    def reset(self) -> None:
        """A uniform in [1, 16], softplus(b) log-uniform in [0.001, 0.1]."""
        with torch.no_grad():
            self.log_rate.copy_(torch.empty_like(self.log_rate).uniform_(1, 16).log())
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.step_bias).uniform_(low, high).exp()
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """`[B, T, D]` to the same; the state is S and the last inputs of the convolution."""
        past, rows = state or (None, None)
        z, xbc, step = self.maps(x).split(self.widths, -1)
        xbc, rows = self.conv(xbc, rows)
        v, k, q = F.silu(xbc).split(self.split, -1)  # x, B and C
        v = v.unflatten(-1, (self.n_heads, self.d_head))
        wide = torch.promote_types(step.dtype, torch.float32)
        step = F.softplus(step.to(wide) + self.step_bias.to(wide)).unsqueeze(-1)  # (B, T, H, 1)
        g = -self.log_rate.to(wide).exp().unsqueeze(-1) * step
        k = (k.unsqueeze(2) * step).to(v.dtype)  # (B, T, H, N)
        q = q.unsqueeze(2).expand_as(k)
        o, past = gla(q, k, v, g, scale=1.0, initial_state=past, output_final_state=True)
        y = (o + self.skip * v).flatten(-2)
        return self.out(self.norm(y * F.silu(z))), (past, rows)


MIXERS = {"mamba2": lambda s: [Mamba2(s.d_model) for _ in range(s.n_layers)]}
