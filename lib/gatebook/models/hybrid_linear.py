"""Hybrids of linear and softmax attention (Wang et al. 2025, arXiv 2507.06457).

The paper trains six linear mixers in the layers of flash-linear-attention, alone and with a softmax
layer after every r of them. The equations are the paper's; convolutions, norms, initial values and
widths are those of flash-linear-attention's layers.

    HGRN            a vector state, one gate a channel
    RetNet          a matrix state with a fixed decay, rotary positions
    GLA             a matrix state, one gate a key channel: `gatebook.models.gla`
    HGRN2           the same with k = 1 − α
    DeltaNet        a matrix state that a key erases before it writes
    GatedDeltaNet   the same with a gate for each head
    HybridLanguageModel   r linear blocks, then one with softmax attention, repeated

Shapes: B batch, T tokens, D model width, H heads, K key and V value channels of a head, L layers.
All mixers with a q scale it by K^(-1/2), and all obey the contract of `gatebook.layers.language`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.kernels import delta_rule, gla, linear_scan
from gatebook.layers.language import (
    Attention,
    Convolved,
    Decoder,
    RMSNorm,
    ShortConv,
    llama_width,
    rotate,
)
from gatebook.models.gla import GLA, GLAConfig

Linear = Literal["hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet"]


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Sizes and choices of a hybrid language model; the defaults are the paper's at 340M."""

    vocab_size: int = 32_000
    d_model: int = 1024  # D
    n_layers: int = 24  # L
    linear: Linear  # mixer of the linear blocks
    ratio: int = -1  # r linear blocks to each softmax block: -1 has no softmax, 0 nothing else
    softmax_first: bool = False  # puts the softmax block before its r linear ones, as a control
    n_heads: int = 0  # H of the linear mixer; 0 takes flash-linear-attention's, see `linear_mixers`
    d_key: int = 0  # K of a linear head; 0 takes flash-linear-attention's
    conv_width: int = 0  # taps of a convolution before every mixer, as a control; 0 as published
    softmax_heads: int = 16  # heads of width D / 16
    d_ff: int = 0  # 0 is LLaMA's width; RetNet's blocks have about half of it
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.linear not in get_args(Linear):
            raise ValueError(f"linear is one of {', '.join(get_args(Linear))}; got {self.linear!r}")
        if self.ratio < -1:
            raise ValueError(f"ratio is -1 (no softmax) or at least 0; got {self.ratio}")


class LowerBounds(nn.Module):
    """HGRN's lower bounds ℓ of the gates: 0 in the first layer, and never lower further up.

    A softmax over the layers of a learned table, its cumulative sum less the first row. All layers
    share the table.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(n_layers, d_model))

    def forward(self, layer: int) -> Tensor:
        """ℓ of a layer, `[D]`, in float32 or wider."""
        wide = torch.promote_types(self.table.dtype, torch.float32)
        shares = self.table.to(wide).softmax(0)
        return shares[1 : layer + 1].sum(0)


class _Bounded(nn.Module):
    """A mixer whose gates have lower bounds: α_t = ℓ + (1 − ℓ) σ(W_f x_t)."""

    def __init__(self, bounds: LowerBounds, layer: int, d_model: int) -> None:
        super().__init__()
        self.layer = layer
        self.bounds = (bounds,)  # in a tuple it belongs to the model, not to each mixer
        self.forget = nn.Linear(d_model, d_model, bias=False)  # W_f
        self.input = nn.Linear(d_model, d_model, bias=False)  # W_i
        self.out = nn.Linear(d_model, d_model, bias=False)

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log α and 1 − α, `[B, T, D]` each, in float32 or wider; exact near α = 1."""
        bound = self.bounds[0](self.layer)
        logits = self.forget(x).to(bound.dtype)
        closed = (1 - bound) * torch.sigmoid(-logits)  # 1 − α
        return torch.log1p(-closed.clamp(max=1 - 1e-7)), closed


class HGRN(_Bounded):
    """h_t = α_t ⊙ h_{t-1} + (1 − α_t) ⊙ SiLU(W_i x_t); y = W_o (norm(h_t) ⊙ SiLU(W_g x_t))."""

    def __init__(self, bounds: LowerBounds, layer: int, d_model: int) -> None:
        super().__init__(bounds, layer, d_model)
        self.output_gate = nn.Linear(d_model, d_model, bias=False)  # W_g
        self.norm = RMSNorm(d_model, eps=1e-5)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` to the same; the state is h `[B, D]`."""
        g, closed = self.gate(x)
        h, state = linear_scan(closed * F.silu(self.input(x)), g, initial_state=state)
        return self.out(self.norm(h.to(x.dtype)) * F.silu(self.output_gate(x))), state


class HGRN2(_Bounded):
    """S_t = Diag(α_t) S_{t-1} + (1 − α_t)ᵀ v_t with q = SiLU(W_q x), v = W_i x; the norm runs over
    all heads, and there is no output gate."""

    def __init__(self, bounds: LowerBounds, layer: int, d_model: int, n_heads: int) -> None:
        super().__init__(bounds, layer, d_model)
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.norm = RMSNorm(d_model, eps=1e-5)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` to the same; the state is S `[B, H, K, K]`."""
        g, closed = self.gate(x)
        q, v = F.silu(self.query(x)), self.input(x)
        q, k, v, g = (
            y.unflatten(-1, (self.n_heads, -1)) for y in (q, closed.to(q.dtype), v, g)
        )  # (B, T, H, K)
        o, state = gla(q, k, v, g, initial_state=state, output_final_state=True)
        return self.out(self.norm(o.flatten(-2))), state


class RetNet(nn.Module):
    """S_t = γ_h S_{t-1} + k_tᵀ v_t with γ_h = 1 − 2^(−5−h), rotary q and k, V = 2 K; each head is
    normed and gated by SiLU(W_g x)."""

    def __init__(self, d_model: int, n_heads: int, rope_base: float = 10_000.0) -> None:
        super().__init__()
        self.n_heads, self.base = n_heads, rope_base
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.output_gate = nn.Linear(d_model, 2 * d_model, bias=False)  # W_g
        self.norm = RMSNorm(2 * d_model // n_heads, eps=1e-5)
        self.out = nn.Linear(2 * d_model, d_model, bias=False)
        heads = torch.arange(n_heads, dtype=torch.float32)
        self.register_buffer("log_gamma", torch.log1p(-(2.0 ** (-5 - heads))), persistent=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor, tuple[Tensor, int]]:
        """`[B, T, D]` to the same; the state is S `[B, H, K, V]` and the tokens so far."""
        past, start = (None, 0) if state is None else state
        heads = (self.n_heads, -1)
        q, k, v = (f(x).unflatten(-1, heads) for f in (self.query, self.key, self.value))
        q, k = rotate(q, self.base, start), rotate(k, self.base, start)
        g = _wide(self.log_gamma).view(1, 1, -1, 1).expand(*x.shape[:2], -1, 1)
        o, past = gla(q, k, v, g, initial_state=past, output_final_state=True)
        y = self.norm(o).flatten(-2) * F.silu(self.output_gate(x))
        return self.out(y), (past, start + x.shape[1])


class DeltaNet(nn.Module):
    """S_t = (I − β_t k_tᵀ k_t) S_{t-1} + β_t k_tᵀ v_t, β = σ(W_β x): read and overwrite.

    q, k and v pass a causal convolution over 4 tokens and SiLU; q and k have length 1.
    """

    def __init__(self, d_model: int, n_heads: int, d_key: int, d_value: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        widths = (n_heads * d_key, n_heads * d_key, n_heads * d_value)
        self.maps = nn.ModuleList(nn.Linear(d_model, width, bias=False) for width in widths)
        self.convs = nn.ModuleList(ShortConv(width, 4) for width in widths)
        self.strength = nn.Linear(d_model, n_heads, bias=False)  # W_β
        self.norm = RMSNorm(d_value, eps=1e-5)
        self.out = nn.Linear(n_heads * d_value, d_model, bias=False)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """`[B, T, D]` to the same; the state is S and the last inputs of the convolutions."""
        past, *before = state or [None] * 4
        mixed, after = [], []
        for f, conv, rows in zip(self.maps, self.convs, before, strict=True):
            y, rows = conv(f(x), rows)
            mixed.append(F.silu(y).unflatten(-1, (self.n_heads, -1)))
            after.append(rows)
        q, k, v = mixed
        q, k = (F.normalize(_wide(y), dim=-1).to(v.dtype) for y in (q, k))
        beta = torch.sigmoid(_wide(self.strength(x)))
        o, past = delta_rule(
            q, k, v, beta, self.log_gate(x), initial_state=past, output_final_state=True
        )
        return self.out(self.read(self.norm(o).flatten(-2), x)), (past, *after)

    def log_gate(self, x: Tensor) -> Tensor | None:
        """log α `[B, T, H]`; None stands for α = 1."""
        return None

    def read(self, o: Tensor, x: Tensor) -> Tensor:
        """What becomes of the normed heads `[B, T, H V]` before the last map."""
        return o


class GatedDeltaNet(DeltaNet):
    """S_t = α_t (I − β_t k_tᵀ k_t) S_{t-1} + β_t k_tᵀ v_t, with a scalar gate for each head,
    α_t = exp(−e^A softplus(w_a x_t + b)), and an output gate SiLU(W_g x)."""

    def __init__(self, d_model: int, n_heads: int, d_key: int, d_value: int) -> None:
        super().__init__(d_model, n_heads, d_key, d_value)
        self.gate = nn.Linear(d_model, n_heads, bias=False)  # w_a
        self.log_rate = nn.Parameter(torch.empty(n_heads))  # A
        self.step_bias = nn.Parameter(torch.empty(n_heads))  # b
        self.output_gate = nn.Linear(d_model, n_heads * d_value, bias=False)  # W_g
        self.reset()

    def reset(self) -> None:
        """e^A uniform in (0, 16), softplus(b) log-uniform in [0.001, 0.1], as published."""
        with torch.no_grad():
            self.log_rate.copy_(torch.empty_like(self.log_rate).uniform_(1e-4, 16).log())
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.step_bias).uniform_(low, high).exp()
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def log_gate(self, x: Tensor) -> Tensor:
        """log α `[B, T, H]`, in float32 or wider."""
        step = F.softplus(_wide(self.gate(x)) + _wide(self.step_bias))
        return -_wide(self.log_rate).exp() * step

    def read(self, o: Tensor, x: Tensor) -> Tensor:
        """Gates the normed heads."""
        return o * F.silu(self.output_gate(x))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_mixers(
    name: Linear, d_model: int, n_heads: int, d_key: int, layers: list[int], n_layers: int
) -> tuple[list[nn.Module], LowerBounds | None]:
    """The linear mixers of a model, with flash-linear-attention's sizes where none are given.

    HGRN2 heads of 128 channels; RetNet 8 heads, V = 2 K; GLA 4 heads, 2 K = V; DeltaNet heads of
    128 and GatedDeltaNet of 256, K = V. Where they are given, H V = D.

    Args:
        name: Of the mixer.
        d_model: D.
        n_heads: H; 0 takes the above.
        d_key: K of a head, for GLA and the delta rules; 0 takes the above.
        layers: Which of the model's layers want one.
        n_layers: L, for the table of lower bounds.

    Returns:
        A mixer for each entry of `layers`; and the table that they share, for HGRN and HGRN2.
    """
    if name in ("hgrn", "hgrn2"):
        bounds = LowerBounds(n_layers, d_model)
        if name == "hgrn":
            return [HGRN(bounds, layer, d_model) for layer in layers], bounds
        heads = n_heads or d_model // 128
        return [HGRN2(bounds, layer, d_model, heads) for layer in layers], bounds
    make: dict[str, Callable[[], nn.Module]] = {
        "retnet": lambda: RetNet(d_model, n_heads or 8),
        "gla": lambda: GLA(_gla_config(d_model, n_heads or 4, d_key)),
        "deltanet": lambda: DeltaNet(d_model, *_delta_sizes(d_model, n_heads, d_key, 128)),
        "gated_deltanet": lambda: GatedDeltaNet(
            d_model, *_delta_sizes(d_model, n_heads, d_key, 256)
        ),
    }
    return [make[name]() for _ in layers], None


def _gla_config(d_model: int, n_heads: int, d_key: int) -> GLAConfig:
    expand_k = n_heads * d_key / d_model if d_key else 0.5
    return GLAConfig(d_model=d_model, n_layers=1, n_heads=n_heads, expand_k=expand_k)


def _delta_sizes(d_model: int, n_heads: int, d_key: int, usual: int) -> tuple[int, int, int]:
    """Heads, key and value channels, with H V = D."""
    n_heads = n_heads or max(1, d_model // usual)
    return n_heads, d_key or d_model // n_heads, d_model // n_heads


class HybridLanguageModel(Decoder):
    """Blocks of one linear mixer, and a softmax block after every `ratio` of them.

    Block i has softmax attention where (i + 1) mod (r + 1) = 0.
    """

    def __init__(self, config: HybridConfig) -> None:
        c = config
        softmax = softmax_layers(c)
        linear = [i for i in range(c.n_layers) if i not in softmax]
        made, bounds = linear_mixers(c.linear, c.d_model, c.n_heads, c.d_key, linear, c.n_layers)
        by_layer = dict(zip(linear, made, strict=True))
        for i in softmax:
            by_layer[i] = Attention(c.d_model, c.softmax_heads, rope_base=c.rope_base)
        if c.conv_width:
            by_layer = {i: Convolved(m, c.d_model, c.conv_width) for i, m in by_layer.items()}
        retnet = 256 * -(-4 * c.d_model // (3 * 256))  # hidden ratio 2 instead of 4
        super().__init__(
            vocab_size=c.vocab_size,
            d_model=c.d_model,
            mixers=[by_layer[i] for i in range(c.n_layers)],
            d_ff=c.d_ff or (retnet if c.linear == "retnet" else llama_width(c.d_model)),
        )
        self.config = config
        self.bounds = bounds


def softmax_layers(config: HybridConfig) -> list[int]:
    """Indices, from 0, of the blocks with softmax attention."""
    if config.ratio == -1:
        return []
    period = config.ratio + 1
    last = 0 if config.softmax_first else config.ratio
    return [i for i in range(config.n_layers) if i % period == last]


def mixer_flops(name: Linear | Literal["softmax"], d_model: int, n_heads: int, length: int) -> int:
    """Operations of a mixer for one token and layer, by Table 4, without its projections.

    Softmax 2 L D with L = `length`; HGRN 5 D; RetNet 5 D²/H; GLA and HGRN2 7 D²/H; the delta rules
    8 D²/H.
    """
    factors = {"retnet": 5, "gla": 7, "hgrn2": 7, "deltanet": 8, "gated_deltanet": 8}
    if name == "softmax":
        return 2 * length * d_model
    if name == "hgrn":
        return 5 * d_model
    return factors[name] * d_model**2 // n_heads


def _published() -> dict[str, tuple[type, HybridConfig]]:
    """The pure models and the ratios of the paper, at both sizes."""
    table = {}
    for size, d_model in (("340m", 1024), ("1.3b", 2048)):
        table[f"hybrid_transformer_{size}"] = HybridConfig(linear="gla", ratio=0, d_model=d_model)
        for name in get_args(Linear):
            for ratio in (-1, 24, 12, 6, 3):
                label = "pure" if ratio == -1 else f"{ratio}to1"
                table[f"hybrid_{name}_{label}_{size}"] = HybridConfig(
                    linear=name, ratio=ratio, d_model=d_model
                )
    return {name: (HybridLanguageModel, config) for name, config in table.items()}


MODELS = _published()


def _hybrid(name: Linear, ratio: int, *, softmax_first: bool = False) -> Callable:
    """The mixers of a model of any size, for `gatebook.mixers`."""

    def make(sizes: Any) -> list[nn.Module]:
        d, h, n = sizes.d_model, sizes.n_heads, sizes.n_layers
        if n % (ratio + 1 if ratio > 0 else 1):
            raise ValueError(f"{name} {ratio}:1 needs a multiple of {ratio + 1} blocks; got {n}")
        config = HybridConfig(
            linear=name, ratio=ratio, softmax_first=softmax_first, d_model=d, n_layers=n
        )
        softmax = softmax_layers(config)
        linear = [i for i in range(n) if i not in softmax]
        made, bounds = linear_mixers(name, d, h, 0, linear, n)
        if bounds is not None:
            made[0].add_module("shared_bounds", bounds)  # so that the table is trained
        by_layer = dict(zip(linear, made, strict=True))
        heads = max(1, d // 64)  # of width 64
        return [by_layer.get(i) or Attention(d, heads) for i in range(n)]

    return make


MIXERS = {name: _hybrid(name, -1) for name in get_args(Linear)}


def _gla(gate: str) -> Callable:
    """GLA with another gate, for `gatebook.mixers`."""

    def make(sizes: Any) -> list[nn.Module]:
        config = GLAConfig(d_model=sizes.d_model, n_layers=1, n_heads=sizes.n_heads, gate=gate)
        return [GLA(config) for _ in range(sizes.n_layers)]

    return make


MIXERS |= {"linear": _gla("none"), "gla_fixed": _gla("fixed")}
HYBRIDS = {
    f"{name} {ratio}:1": _hybrid(name, ratio) for name in get_args(Linear) for ratio in (1, 3, 7)
}
HYBRIDS |= {
    f"{name} {ratio}:1, softmax first": _hybrid(name, ratio, softmax_first=True)
    for name in get_args(Linear)
    for ratio in (1, 3)
}
