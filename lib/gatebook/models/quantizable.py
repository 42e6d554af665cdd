"""Quantizable Transformers (Bondarenko et al. 2023, arXiv 2306.12929): heads that can do nothing.

From the paper: clipped softmax, and the gate of each head. From the released code: the gates'
initial values, what they read, and which tensors are quantised.

    clipped_softmax     clip((ζ − γ) softmax(x) + γ, 0, 1)
    HeadGate            σ(G(x)), one number for each head and token
    HeadAttention       multi-head attention with either
    QuantizableModel    BERT (post-norm, masked words), OPT (pre-norm, causal), ViT (pre-norm)

Every tensor that the paper quantises leaves a leaf module of its own; where no other module gives
it, that is an `nn.Identity`. `gatebook.measure.quantization` hooks onto them.

Shapes: B batch, T queries, S keys, D model width, H heads, K channels of a head, F hidden width of
the feed-forward network, N vocabulary or classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Family = Literal["bert", "opt", "vit"]
GateKind = Literal["none", "linear", "mlp", "all-heads"]
State = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class QuantizableConfig:
    """Sizes and choices of a BERT, OPT or ViT; the defaults are those of BERT-base."""

    family: Family  # bert: post-norm; opt: pre-norm, causal; vit: pre-norm on patches
    n_out: int  # N: words that are embedded and predicted, or classes of images
    d_model: int = 768  # D
    n_layers: int = 12  # blocks
    n_heads: int = 12  # H
    d_ff: int = 3072  # F
    n_positions: int  # rows of the table of learned positions
    length: int  # T of training, by which γ is scaled
    alpha: float = 0.0  # γ = −α / length; 0 is no clipping at zero
    zeta: float = 1.0  # ζ ≥ 1; above 1, large weights are clipped to one
    gate: GateKind = "none"  # see `HeadGate`
    pi_init: float = 0.5  # score at which the linear gate starts
    dropout: float = 0.1  # on attention weights and sub-layer outputs, in training
    init_std: float = 0.02  # of every linear map and embedding but the gates'
    norm_eps: float = 1e-12  # of every LayerNorm
    patch: int = 16  # side of a patch in pixels (vit)
    patch_norm: bool = True  # LayerNorm after the patch embedding, the paper's addition (vit)

    def __post_init__(self) -> None:
        for field, allowed in (
            ("family", ("bert", "opt", "vit")),
            ("gate", ("none", "linear", "mlp", "all-heads")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {self!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model}")
        if self.alpha < 0 or self.zeta < 1:
            raise ValueError(f"alpha is at least 0 and zeta 1; got {self.alpha} and {self.zeta}")
        if not 0 < self.pi_init < 1:
            raise ValueError(f"pi_init lies between 0 and 1; got {self.pi_init}")

    @property
    def vocab_size(self) -> int:
        """N, under the name that training jobs on text look for."""
        return self.n_out

    @property
    def gamma(self) -> float:
        """γ ≤ 0, from the length of training, never from that of the input."""
        return -self.alpha / self.length


def clipped_softmax(x: Tensor, gamma: float, zeta: float = 1.0) -> Tensor:
    """clip((ζ − γ) softmax(x) + γ, 0, 1) over the last axis.

    Weights up to −γ / (ζ − γ) become zero and send no gradient. Rows do not sum to one any more,
    and are not normed again. Keys that are masked with −∞ keep a weight of zero.

    Args:
        x: Scores, `[..., S]`.
        gamma: γ ≤ 0; 0 with ζ = 1 is softmax.
        zeta: ζ ≥ 1.

    Raises:
        ValueError: γ above 0 or ζ below 1.
    """
    if gamma > 0 or zeta < 1:
        raise ValueError(f"gamma is at most 0 and zeta at least 1; got {gamma} and {zeta}")
    return ((zeta - gamma) * x.softmax(-1) + gamma).clamp(0, 1)


class HeadGate(nn.Module):
    """π = σ(G(x)): how much of a head's output a token lets through.

    linear     head h reads slice h of the token, through K weights and a bias
    mlp        the same through K / 4 hidden units with ReLU
    all-heads  every head reads the whole token
    """

    def __init__(self, config: QuantizableConfig) -> None:
        super().__init__()
        self.kind, self.pi_init = config.gate, config.pi_init
        self.n_heads, d_head = config.n_heads, config.d_model // config.n_heads
        widths = {"linear": [d_head, 1], "mlp": [d_head, d_head // 4, 1]}.get(self.kind)
        if self.kind == "all-heads":
            self.all_heads = nn.Linear(config.d_model, self.n_heads)
            return
        self.weights = nn.ParameterList(
            torch.empty(self.n_heads, n_in, n_out) for n_in, n_out in pairwise(widths)
        )
        self.biases = nn.ParameterList(torch.empty(self.n_heads, n) for n in widths[1:])
        self.reset()

    def reset(self) -> None:
        """PyTorch's own start of a linear map; the linear gate's bias is logit(π_init)."""
        if self.kind == "all-heads":
            self.all_heads.reset_parameters()
            return
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        if self.kind == "linear":
            nn.init.constant_(self.biases[0], log(self.pi_init / (1 - self.pi_init)))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input `[B, T, D]` to scores `[B, T, H]` in (0, 1)."""
        if self.kind == "all-heads":
            return self.all_heads(x).sigmoid()
        x = x.unflatten(-1, (self.n_heads, -1))  # (B, T, H, K)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.einsum("bthi,hio->btho", x.relu() if number else x, weight) + bias
        return x.squeeze(-1).sigmoid()


class HeadAttention(nn.Module):
    """Multi-head attention whose heads can do nothing: clipped softmax, or a gate on each head."""

    def __init__(self, config: QuantizableConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_model
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.scores, self.probs, self.context = (nn.Identity() for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)
        if config.gate != "none":
            self.gate, self.gated = HeadGate(config), nn.Identity()

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mixes tokens.

        Args:
            x: Inputs `[B, T, D]`.
            state: Keys and values of the tokens before, `[B, H, P, K]` each (causal models only).

        Returns:
            The outputs `[B, T, D]`, and keys and values with those of x.

        Raises:
            ValueError: A state for a model that reads in both directions.
        """
        k, v = self._heads(self.key(x)), self._heads(self.value(x))
        if state is not None:
            if self.config.family != "opt":
                raise ValueError(f"{self.config.family} reads in both directions: it has no state")
            k, v = (torch.cat(pair, 2) for pair in zip(state, (k, v), strict=True))
        probs = self.dropout(self.weights(x, k))
        context = self.context(probs @ v).transpose(1, 2)  # (B, T, H, K)
        if self.config.gate != "none":
            context = self.gated(context * self.gate(x).unsqueeze(-1))
        return self.out(context.flatten(-2)), (k, v)

    def weights(self, x: Tensor, k: Tensor | None = None) -> Tensor:
        """Attention weights `[B, H, T, S]` after clipping, of inputs `[B, T, D]`."""
        c = self.config
        return self.probs(clipped_softmax(self.logits(x, k), c.gamma, c.zeta))

    def logits(self, x: Tensor, k: Tensor | None = None) -> Tensor:
        """Scores before softmax `[B, H, T, S]`, −∞ where a key is not seen."""
        k = self._heads(self.key(x)) if k is None else k
        q = self._heads(self.query(x))
        scores = self.scores(q @ k.mT * q.shape[-1] ** -0.5)
        if self.config.family == "opt":
            past = k.shape[2] - q.shape[2]
            future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + past)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.float() if scores.dtype == torch.bfloat16 else scores

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)  # (B, H, T, K)


class FeedForward(nn.Module):
    """W_2 φ(W_1 x + b_1) + b_2, φ GELU; ReLU in OPT."""

    def __init__(self, config: QuantizableConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.act = nn.ReLU() if config.family == "opt" else nn.GELU()
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to the same."""
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Attention, then feed-forward. Post-norm x = norm(x + f(x)), pre-norm x = x + f(norm(x))."""

    def __init__(self, config: QuantizableConfig) -> None:
        super().__init__()
        self.post_norm = config.family == "bert"
        self.mixer_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mixer = HeadAttention(config)
        self.mixer_sum = nn.Identity()
        self.ffn_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_sum = nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`[B, T, D]` and the mixer's state to the same."""
        mixed, state = self.mixer(x if self.post_norm else self.mixer_norm(x), state)
        x = self.mixer_sum(x + self.dropout(mixed))
        x = self.mixer_norm(x) if self.post_norm else x
        y = self.ffn(x if self.post_norm else self.ffn_norm(x))
        x = self.ffn_sum(x + self.dropout(y))
        return self.ffn_norm(x) if self.post_norm else x, state


class Inside(NamedTuple):
    """What a block did with a batch."""

    logits: Tensor  # attention scores before softmax `[B, H, T, T]`, −∞ where a key is not seen
    weights: Tensor  # the same after (clipped) softmax
    gate: Tensor | None  # scores `[B, T, H]`; None without a gate
    ffn: Tensor  # output of the feed-forward network `[B, T, D]`
    output: Tensor  # of the block `[B, T, D]`: after the norm in BERT, the residual sum else


class QuantizableModel(nn.Module):
    """BERT, OPT or ViT with heads that can do nothing.

    BERT predicts masked words through a dense layer, GELU and LayerNorm; OPT the next word; both
    with the embedding's matrix. ViT reads patches and a class token, and classifies from that.
    """

    def __init__(self, config: QuantizableConfig) -> None:
        super().__init__()
        self.config, d, eps = config, config.d_model, config.norm_eps
        if config.family == "vit":
            self.patches = nn.Conv2d(3, d, config.patch, config.patch)
            self.class_token = nn.Parameter(torch.zeros(1, 1, d))
        else:
            self.embedding = nn.Embedding(config.n_out, d)
        self.positions = nn.Embedding(config.n_positions, d)
        self.embedded = nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        if config.family == "bert" or (config.family == "vit" and config.patch_norm):
            self.embedding_norm = nn.LayerNorm(d, eps=eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        if config.family == "bert":
            self.transform = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=eps))
        else:
            self.norm = nn.LayerNorm(d, eps=eps)
        self.head = nn.Linear(d, config.n_out, bias=config.family != "opt")
        if config.family != "vit":
            self.head.weight = self.embedding.weight
        self.apply(self._initialise)
        self.apply(lambda module: module.reset() if isinstance(module, HeadGate) else None)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, x: Tensor, past: int = 0) -> Tensor:
        """Words `[B, T]` or pictures `[B, 3, height, width]` to `[B, T, D]`.

        The patch LayerNorm of ViT comes before class token and positions.
        """
        if self.config.family == "vit":
            x = self.patches(x).flatten(2).mT  # (B, T - 1, D)
            x = self.embedding_norm(x) if self.config.patch_norm else x
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        else:
            x = self.embedding(x)
        places = torch.arange(past, past + x.shape[1], device=x.device)
        x = self.embedded(x + self.positions(places))
        return self.dropout(self.embedding_norm(x) if self.config.family == "bert" else x)

    def classify(self, x: Tensor) -> Tensor:
        """The last block's output `[B, T, D]` to logits: `[B, T, N]`, or `[B, N]` of ViT."""
        if self.config.family == "bert":
            return self.head(self.transform(x))
        return self.head(self.norm(x[:, 0] if self.config.family == "vit" else x))

    def forward(self, x: Tensor) -> Tensor:
        """Words `[B, T]` to logits `[B, T, N]`; pictures `[B, 3, height, width]` to `[B, N]`."""
        x = self.embed(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.classify(x)

    @torch.no_grad()
    def look(self, x: Tensor) -> Iterator[Inside]:
        """Words or pictures, as `forward`, to what each block does with them."""
        x = self.embed(x)
        for block in self.blocks:
            given = x if block.post_norm else block.mixer_norm(x)
            gate = block.mixer.gate(given) if self.config.gate != "none" else None
            kept: list[Tensor] = []
            hook = block.ffn.register_forward_hook(lambda m, args, y, kept=kept: kept.append(y))
            x, _ = block(x)
            hook.remove()
            logits, weights = block.mixer.logits(given), block.mixer.weights(given)
            yield Inside(logits, weights, gate, kept[0], x)

    def continue_from(self, tokens: Tensor, states: list[State] | None) -> tuple[Tensor, list]:
        """Logits `[B, T, N]` for tokens `[B, T]` that follow others, and the states after them.

        OPT only: `states` is what the call on the tokens before returned, None at the start.
        """
        x = self.embed(tokens, past=states[0][0].shape[2] if states else 0)
        after = []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, state = block(x, state)
            after.append(state)
        return self.classify(x), after


MODELS = {
    "quantizable_bert_base": (
        QuantizableModel,
        QuantizableConfig(family="bert", n_out=30_522, n_positions=512, length=128),
    ),
    "quantizable_opt_125m": (
        QuantizableModel,
        QuantizableConfig(
            family="opt",
            n_out=50_272,
            n_positions=2048,
            length=512,
            init_std=0.006,
            norm_eps=1e-5,
        ),
    ),
    "quantizable_vit_s": (
        QuantizableModel,
        QuantizableConfig(
            family="vit",
            n_out=1000,
            d_model=384,
            n_heads=6,
            d_ff=1536,
            n_positions=197,
            length=197,
            dropout=0.0,
            norm_eps=1e-6,
        ),
    ),
}
