"""Gated Linear Attention Transformer (Yang et al. 2023, arXiv 2312.06635, version 6).

Read in the paper: §4.1 to §4.4 and the configurations of §5. From the released code: the factor
d_k'^(-1/2) on the queries, the residual of the second sub-layer, RMSNorm as the norm of each head.

    GLA                the paper's layer, with any of the four gates of its ablation (Table 4)
    GLALanguageModel   embedding, n blocks, norm, linear head

With softmax attention and RoPE in place of GLA the model is the paper's baseline, Transformer++.
Decoder, block, SwiGLU and attention are shared with other chapters: `gatebook.layers.language`.

Shapes: B batch, T tokens, D model width, H heads, K key channels and V value channels of a head,
F hidden width of the feed-forward network, N vocabulary. S: state of a layer `[B, H, K, V]`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.kernels import gla
from gatebook.layers.language import Attention, Decoder, RMSNorm

Gate = Literal["none", "fixed", "scalar", "vector"]


@dataclass(frozen=True, kw_only=True)
class GLAConfig:
    """Sizes and choices of a GLA language model; the defaults are the paper's."""

    vocab_size: int = 32_000  # N; the paper uses the tokeniser of Mistral
    d_model: int  # D
    n_layers: int  # blocks
    n_heads: int = 4  # H
    expand_k: float = 0.5  # H K / D
    expand_v: float = 1.0  # H V / D
    gate: Gate = "vector"  # "vector" is GLA; "fixed" RetNet without rotation; "none" ungated
    gate_rank: int = 16  # inner width of the vector gate's low-rank map
    tau: float = 16.0  # gate temperature: α = sigmoid(logit)^(1/τ)
    d_ff: int = 0  # F; 0 takes the paper's 256 ⌈8 D / (3 · 256)⌉
    mixer: Literal["gla", "attention"] = "gla"  # "attention" builds Transformer++
    rope_base: float = 10_000.0  # of the attention mixer; 0 leaves positions out
    init_std: float = 0.02  # of every linear map and of the embedding; biases start at 0
    norm_eps: float = 1e-6  # of every RMSNorm
    backend: str = "auto"  # form of the operator, see `gatebook.kernels.gla`
    chunk_size: int = 64  # C of the chunkwise form

    def __post_init__(self) -> None:
        if self.mixer not in ("gla", "attention"):
            raise ValueError(f"mixer must be gla or attention; got {self.mixer!r}")
        if self.n_heads < 1 or self.tau <= 0:
            raise ValueError(
                f"n_heads is at least 1 and tau positive; got {self.n_heads} and {self.tau}"
            )


class LogGate(nn.Module):
    """The logarithm of the forget gate, log α_t ≤ 0, by one of the four rules of Table 4.

    none    log α = 0
    fixed   log α = log(1 − 2^(−5−h)) for head h, as RetNet
    scalar  log α_t = logsigmoid(x_t w + b) / τ, one for each head
    vector  log α_t = logsigmoid(x_t W¹ W² + b) / τ, one for each key channel (§4.4)
    """

    def __init__(self, config: GLAConfig, d_key: int) -> None:
        super().__init__()
        self.kind, self.tau, self.n_heads = config.gate, config.tau, config.n_heads
        heads = torch.arange(config.n_heads, dtype=torch.float32)
        if self.kind == "vector":
            self.down = nn.Linear(config.d_model, config.gate_rank, bias=False)
            self.up = nn.Linear(config.gate_rank, config.n_heads * d_key)
        elif self.kind == "scalar":
            self.up = nn.Linear(config.d_model, config.n_heads)
        elif self.kind == "fixed":
            self.register_buffer("log_gamma", torch.log1p(-(2.0 ** (-5 - heads))), persistent=False)
        elif self.kind == "none":
            self.register_buffer("log_gamma", 0 * heads, persistent=False)
        else:
            raise ValueError(f"gate must be none, fixed, scalar or vector; got {self.kind!r}")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to log-gates `[B, T, H, K]` (vector) or `[B, T, H, 1]`, in float32."""
        if self.kind in ("none", "fixed"):
            return self.log_gamma.view(1, 1, -1, 1).expand(*x.shape[:2], -1, 1)
        logits = self.up(self.down(x) if self.kind == "vector" else x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.logsigmoid(logits.to(wide)).unflatten(-1, (self.n_heads, -1)) / self.tau


class GLA(nn.Module):
    """The GLA layer (§4.4): O = GLA(Q, K, V, α), y = (SiLU(x W_r) ⊙ concat_h norm(o^h)) W_O.

    Departures from the text: RMSNorm with one weight of width V shared by the heads where the text
    has LayerNorm, no bias on W_r, and q scaled by K^(-1/2); all three as in flash-linear-attention.
    """

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        d, h = config.d_model, config.n_heads
        d_key, d_value = round(d * config.expand_k), round(d * config.expand_v)
        if d_key % h or d_value % h:
            raise ValueError(f"n_heads={h} must divide the key width {d_key} and value {d_value}")
        self.n_heads, self.backend, self.chunk_size = h, config.backend, config.chunk_size
        self.query = nn.Linear(d, d_key, bias=False)
        self.key = nn.Linear(d, d_key, bias=False)
        self.value = nn.Linear(d, d_value, bias=False)
        self.log_gate = LogGate(config, d_key // h)
        self.output_gate = nn.Linear(d, d_value, bias=False)  # W_r
        self.norm = RMSNorm(d_value // h, eps=config.norm_eps)
        self.out = nn.Linear(d_value, d, bias=False)  # W_O

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixes tokens.

        Args:
            x: Normed inputs `[B, T, D]`.
            state: S after the tokens before x, `[B, H, K, V]`; None at the start of a sequence.

        Returns:
            The outputs `[B, T, D]` and S after x.
        """
        heads = (self.n_heads, -1)
        q, k, v = (f(x).unflatten(-1, heads) for f in (self.query, self.key, self.value))
        o, state = gla(
            q,
            k,
            v,
            self.log_gate(x),
            initial_state=state,
            output_final_state=True,
            backend=self.backend,
            chunk_size=self.chunk_size,
        )
        return self.out(F.silu(self.output_gate(x)) * self.norm(o).flatten(-2)), state


class GLALanguageModel(Decoder):
    """Embedding, blocks, norm and an untied linear head, with one mixer in all blocks.

    The text of §4.4 prints + X twice in the block; `Block` adds the feed-forward network to Y.
    """

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            mixers=[self._mixer(config) for _ in range(config.n_layers)],
            d_ff=config.d_ff,
            norm_eps=config.norm_eps,
            init_std=config.init_std,
        )
        self.config = config

    @staticmethod
    def _mixer(config: GLAConfig) -> nn.Module:
        if config.mixer == "gla":
            return GLA(config)
        return Attention(config.d_model, config.n_heads, rope_base=config.rope_base)


MODELS = {
    "gla_340m": (GLALanguageModel, GLAConfig(d_model=1024, n_layers=24)),
    "gla_1.3b": (GLALanguageModel, GLAConfig(d_model=2048, n_layers=24)),
}
