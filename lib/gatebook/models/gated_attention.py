"""Gated attention for large language models (Qiu et al. 2025, arXiv 2505.06708).

From the paper: the gate, its five positions and its variants (Tables 1, 3 and 4). From the
released code: QK normalisation before the rotation, no biases, gates that start near one half.

    Gate                  Y' = Y ⊙ σ(X W_θ), and the variants of the paper's tables
    GatedAttention        grouped-query attention with a gate at one of five positions
    SparseSwiGLU          the mixture of experts of the 15A2B model, without its training losses
    GatedAttentionModel   embedding, n blocks, norm, linear head

Decoder, block, SwiGLU and rotation are shared with other chapters: `gatebook.layers.language`.

Shapes: B batch, T tokens, P tokens before them, D model width, H query heads, G key and value
heads, K channels of a head, F hidden width of the feed-forward network, E experts, N vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.kernels import softmax_attention
from gatebook.layers.language import Decoder, RMSNorm, SwiGLU, rotate

Kind = Literal["none", "elementwise", "headwise", "shared", "fixed", "norm", "silu"]
Form = Literal["sigmoid", "non-sparse", "additive"]
Position = Literal["G1", "G2", "G3", "G4", "G5"]
PROJECTED = ("elementwise", "headwise", "shared")  # gates that are computed from the token
KINDS = ("none", *PROJECTED, "fixed", "norm", "silu")
FORMS = ("sigmoid", "non-sparse", "additive")


@dataclass(frozen=True, kw_only=True)
class GatedAttentionConfig:
    """Sizes and choices of a language model with gated attention; the defaults are the paper's."""

    vocab_size: int = 151_936  # N; the tokeniser of Qwen, which the released code derives from
    d_model: int  # D
    n_layers: int  # blocks
    n_heads: int  # H
    n_kv_heads: int  # G
    d_head: int = 128  # K; H K need not be D
    d_ff: int  # F, of each expert if there are any
    n_experts: int = 0  # E; 0 is one feed-forward network for all tokens
    n_active: int = 8  # experts that a token uses
    tied: bool = True  # whether the head uses the embedding's matrix
    gate: Kind = "elementwise"  # what is multiplied on; see `Gate`
    form: Form = "sigmoid"  # how a gate acts; see `Gate`
    position: Position = "G1"  # after: G1 attention, G2 values, G3 keys, G4 queries, G5 W_O
    rope_base: float = 10_000.0  # of the rotary positions
    norm_eps: float = 1e-6  # of every RMSNorm
    init_std: float = 0.02  # of every linear map and of the embedding

    def __post_init__(self) -> None:
        for field, allowed in (
            ("gate", KINDS),
            ("form", FORMS),
            ("position", ("G1", "G2", "G3", "G4", "G5")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {self!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.form != "sigmoid" and self.gate not in PROJECTED:
            raise ValueError(f"gate={self.gate!r} has one form, sigmoid; got form={self.form!r}")
        if self.gate == "headwise" and self.position in ("G3", "G4"):
            raise ValueError(
                f"a headwise gate at {self.position} is cancelled by the norm of queries and keys; "
                "allowed there: elementwise, shared, fixed"
            )
        if self.n_experts and not 1 <= self.n_active <= self.n_experts:
            raise ValueError(f"n_active must be 1 to n_experts; got {self.n_active}")


class Gate(nn.Module):
    """Y' = Y ⊙ σ(X W_θ) and its variants (Tables 1, 3 and 4).

    elementwise  W_θ `[D, H K]`: one gate for each channel of each head
    headwise     W_θ `[D, H]`: one for each head
    shared       W_θ `[D, H K]`, the scores averaged over the heads
    fixed        a table `[H, K]` of zeros instead of X W_θ: no token is looked at
    norm, silu   RMSNorm of each head, or SiLU: non-linear, and no gate at all

    The form "non-sparse" has ½ + ½ σ for σ; "additive" has Y' = Y + SiLU(X W_θ).
    """

    def __init__(self, config: GatedAttentionConfig, n_heads: int, d_head: int) -> None:
        super().__init__()
        self.kind, self.form, self.n_heads = config.gate, config.form, n_heads
        if self.kind in PROJECTED:
            width = n_heads * (1 if self.kind == "headwise" else d_head)
            self.proj = nn.Linear(config.d_model, width, bias=False)
        elif self.kind == "fixed":
            self.table = nn.Parameter(torch.zeros(n_heads, d_head))
        elif self.kind == "norm":
            self.norm = RMSNorm(d_head, eps=config.norm_eps)

    def scores(self, x: Tensor) -> Tensor:
        """Normed inputs `[B, T, D]` to what Y is multiplied by, or gets added: `[B, T, H, K]`,
        with 1 for K if headwise and 1 for H if shared; `[H, K]` if fixed."""
        if self.kind == "fixed":
            return self.table.sigmoid()
        logits = self.proj(x).unflatten(-1, (self.n_heads, -1))
        scores = F.silu(logits) if self.form == "additive" else logits.sigmoid()
        if self.form == "non-sparse":
            scores = 0.5 + 0.5 * scores
        return scores.mean(2, keepdim=True) if self.kind == "shared" else scores

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Y `[B, T, H, K]` and normed inputs X `[B, T, D]` to Y' `[B, T, H, K]`."""
        if self.kind == "norm":
            return self.norm(y)
        if self.kind == "silu":
            return F.silu(y)
        return y + self.scores(x) if self.form == "additive" else y * self.scores(x)


class GatedAttention(nn.Module):
    """Causal grouped-query attention, Y_h = softmax(Q_h K_g(h)ᵀ / √K) V_g(h), with a gate.

    The gate at G1 reads the token that asks: Y' = Y ⊙ σ(X W_θ), O = concat_h(Y'_h) W_O. X is the
    block's normed input in all positions.
    """

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__()
        d, k = config.d_model, config.d_head
        h, g = config.n_heads, config.n_kv_heads
        self.d_head, self.base = k, config.rope_base
        self.query = nn.Linear(d, h * k, bias=False)
        self.key = nn.Linear(d, g * k, bias=False)
        self.value = nn.Linear(d, g * k, bias=False)
        self.query_norm = RMSNorm(k, eps=config.norm_eps)
        self.key_norm = RMSNorm(k, eps=config.norm_eps)
        self.out = nn.Linear(h * k, d, bias=False)  # W_O
        heads = {"G1": (h, k), "G2": (g, k), "G3": (g, k), "G4": (h, k), "G5": (1, d)}
        self.position = None if config.gate == "none" else config.position
        if self.position:
            self.gate = Gate(config, *heads[self.position])

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Mixes tokens.

        Args:
            x: Normed inputs `[B, T, D]`.
            state: Rotated keys and gated values of the tokens before, `[B, P, G, K]` each.

        Returns:
            The outputs `[B, T, D]`, and keys and values with those of x.
        """
        past = 0 if state is None else state[0].shape[1]
        q, k = self.queries_and_keys(x, past)
        v = self._gated("G2", self._heads(self.value(x)), x)
        if state is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(state, (k, v), strict=True))
        y = self._gated("G1", softmax_attention(q, k, v, causal=True, past=past), x)
        o = self.out(y.flatten(-2)).unsqueeze(-2)  # (B, T, 1, D)
        return self._gated("G5", o, x).squeeze(-2), (k, v)

    def queries_and_keys(self, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
        """Projected, normed and rotated, `[B, T, H, K]` and `[B, T, G, K]`.

        Gates at G3 and G4 act on the projections, before the norm.
        """
        q = self._gated("G4", self._heads(self.query(x)), x)
        k = self._gated("G3", self._heads(self.key(x)), x)
        q, k = self.query_norm(q), self.key_norm(k)
        return rotate(q, self.base, past), rotate(k, self.base, past)

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights of a whole sequence, for looking at: `[B, T, D]` to
        `[B, H, T, T]`, query by key, in float32 or more."""
        q, k = self.queries_and_keys(x)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bthk,bshk->bhts", q, k) * self.d_head**-0.5
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.to(wide).masked_fill(future, float("-inf")).softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.d_head))

    def _gated(self, position: str, y: Tensor, x: Tensor) -> Tensor:
        return self.gate(y, x) if position == self.position else y


class SparseSwiGLU(nn.Module):
    """A mixture of SwiGLUs: each token goes to the experts of its largest router probabilities.

    y = Σ_{e in top} p_e / (Σ_top p) SwiGLU_e(x), p = softmax(x W_r). The losses that balance the
    experts in training are not here: the chapter counts and prices this model.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, n_active: int) -> None:
        super().__init__()
        self.n_active = n_active
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        top, chosen = self.router(x).softmax(-1).topk(self.n_active)  # (..., n_active)
        top = top / top.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (top * (chosen == number)).sum(-1)  # (...), 0 for tokens that go elsewhere
            there = share > 0
            y[there] += share[there].unsqueeze(-1) * expert(x[there])
        return y


class Inside(NamedTuple):
    """What a block did with a batch of whole sequences."""

    weights: Tensor  # attention `[B, H, T, T]`, query by key
    scores: Tensor | None  # of the gate, as `Gate.scores`; None where there are none
    hidden: Tensor  # the block's output `[B, T, D]`


class GatedAttentionModel(Decoder):
    """Embedding, blocks of gated attention and SwiGLU, norm and a linear head."""

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            mixers=[GatedAttention(config) for _ in range(config.n_layers)],
            d_ff=config.d_ff,
            norm_eps=config.norm_eps,
            init_std=config.init_std,
            tied=config.tied,
        )
        self.config = config
        if config.n_experts:
            sizes = (config.d_model, config.d_ff, config.n_experts, config.n_active)
            for block in self.blocks:
                block.ffn = SparseSwiGLU(*sizes).apply(self._initialise)

    @torch.no_grad()
    def look(self, tokens: Tensor) -> Iterator[Inside]:
        """Token ids `[B, T]` to what each block does with them, block after block."""
        x = self.embedding(tokens)
        for block in self.blocks:
            normed, scores = block.mixer_norm(x), None
            if hasattr(block.mixer, "gate") and block.mixer.gate.kind not in ("norm", "silu"):
                scores = block.mixer.gate.scores(normed)
            x, _ = block(x)
            yield Inside(block.mixer.weights(normed), scores, x)


MODELS = {
    "gated_attention_1.7b": (
        GatedAttentionModel,
        GatedAttentionConfig(d_model=2048, n_layers=28, n_heads=16, n_kv_heads=8, d_ff=6144),
    ),
    "gated_attention_1.7b_48l": (
        GatedAttentionModel,
        GatedAttentionConfig(d_model=1536, n_layers=48, n_heads=16, n_kv_heads=8, d_ff=4608),
    ),
    "gated_attention_15a2b": (
        GatedAttentionModel,
        GatedAttentionConfig(
            d_model=2048,
            n_layers=24,
            n_heads=32,
            n_kv_heads=4,
            d_ff=768,
            n_experts=128,
            tied=False,
        ),
    ),
}


def _mixer(gate: Kind, d_model: int, n_heads: int) -> GatedAttention:
    """One layer with as many key as query heads, for `gatebook.mixers`."""
    return GatedAttention(
        GatedAttentionConfig(
            d_model=d_model,
            n_layers=1,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_model // n_heads,
            d_ff=1,
            gate=gate,
        )
    )


MIXERS = {  # both norm queries and keys
    "softmax_qk_norm": lambda s: [_mixer("none", s.d_model, s.n_heads) for _ in range(s.n_layers)],
    "gated_softmax": lambda s: [
        _mixer("elementwise", s.d_model, s.n_heads) for _ in range(s.n_layers)
    ],
}
