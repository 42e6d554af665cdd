"""The two baselines of the GAM paper (Acharya, arXiv:2509.00605), from its released code.

    Transformer  the block of GAM with multi-head attention in its place
    BareMamba    a stack of bare Mamba layers, no residuals, no norms

Shape legend
    B batch, T tokens, D model width, V vocabulary, K convolution taps, H heads, I inner width of a
    Mamba layer, N its state size, R the rank of its step size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatebook.models.gam import Block, Init, LanguageModel, LocalPath


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the baseline Transformer; the defaults are the paper's."""

    vocab_size: int = 10_000  # V
    context: int = 256  # rows of the learned position table
    d_model: int = 512  # D
    n_layers: int = 6
    n_heads: int = 8  # H
    dropout: float = 0.1  # on the embeddings, attention weights and both residual branches
    materialise: bool = False  # True writes out the [B, H, T, T] weights, as the paper's code does
    init: Init = "released"  # see `init_embeddings`


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes of the baseline of bare Mamba layers; the defaults are the paper's."""

    vocab_size: int = 10_000  # V
    context: int = 256  # rows of the learned position table
    d_model: int = 512  # D
    n_layers: int = 6
    expand: int = 3  # I = expand D
    d_state: int = 16  # N
    d_conv: int = 4  # K
    dropout: float = 0.1  # on the embeddings
    init: Init = "released"  # see `init_embeddings`


class Attention(nn.Module):
    """Causal multi-head attention of the baseline, with biases in both projections."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.materialise = config.materialise
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, u: Tensor) -> Tensor:
        """Attends: [B, T, D] -> [B, T, D]."""
        batch, length, width = u.shape
        q, k, v = self.qkv(u).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attend = attend_materialised if self.materialise else attend_fused
        out = attend(q, k, v, dropout)  # (B, H, T, D/H)
        out = self.out(out.transpose(1, 2).reshape(batch, length, width))
        return F.dropout(out, self.dropout, self.training)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention through torch's fused kernel; all of shape [B, H, T, D/H]."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attend_materialised(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same with the [B, H, T, T] weights written to memory, as in the paper's comparison."""
    length = q.shape[2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    return F.dropout(weights, dropout, dropout > 0) @ v


class Transformer(LanguageModel):
    """The paper's baseline: attention in place of GAM, all else equal."""

    def __init__(self, config: TransformerConfig) -> None:
        d, dropout = config.d_model, config.dropout
        blocks = [Block(Attention(config), d, dropout) for _ in range(config.n_layers)]
        super().__init__(config, blocks)


class MambaLayer(nn.Module):
    """Selective state space layer (Gu and Dao, arXiv:2312.00752) as a loop over the tokens.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = C_t h_t + D x_t, gated by SiLU(z). Written to
    be read and counted, not to be fast.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        inner, self.d_state = config.expand * config.d_model, config.d_state
        self.rank = math.ceil(config.d_model / 16)
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.conv = LocalPath(inner, config.d_conv)
        self.x_proj = nn.Linear(inner, self.rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        init_step_size(self.dt_proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, I) each
        x = F.silu(self.conv(x))
        dt, b, c = self.x_proj(x).split([self.rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))  # (B, T, I)
        y = selective_scan(x, dt, -self.A_log.exp(), b, c) + self.D * x
        return self.out_proj(y * F.silu(z))


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Runs the recurrence of `MambaLayer`.

    Args:
        x: Inputs, [B, T, I].
        dt: Step sizes, [B, T, I].
        a: Decay rates, negative, [I, N].
        b: Input weights, [B, T, N].
        c: Output weights, [B, T, N].

    Returns:
        y without the skip term, [B, T, I].
    """
    state = x.new_zeros(x.shape[0], x.shape[2], a.shape[1])  # (B, I, N)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * a)
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def init_step_size(dt_proj: nn.Linear, low: float = 1e-3, high: float = 0.1) -> None:
    """Mamba's initialisation: softplus of the bias is log-uniform in [low, high]."""
    with torch.no_grad():
        dt = torch.rand_like(dt_proj.bias).mul(math.log(high / low)).exp() * low
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    nn.init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)


class BareMamba(LanguageModel):
    """The paper's Mamba baseline: layers in series, without residual connections or norms between.

    The final LayerNorm is inferred from the other two models; with or without its 2D parameters
    the model has 20.50M.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config, [MambaLayer(config) for _ in range(config.n_layers)])


MODELS = {
    "gam_transformer": (Transformer, TransformerConfig()),  # Table 1: 24.2M
    "gam_mamba": (BareMamba, MambaConfig()),  # Table 1: 20.5M
}
