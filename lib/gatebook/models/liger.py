"""Liger (Lan et al. 2025, arXiv 2503.01496): a pretrained Transformer turned into a gated
recurrence with a sliding window, without a new parameter.

    LigerAttention  the two branches, from the projections of softmax attention
    LigerDecoder    a LLaMA decoder with that mixer, or with its own softmax attention
    convert         the same weights under another mixer
    LowRank         a frozen linear map and a low-rank change to it (LoRA)
    add_low_rank    puts it into the attention projections, where it alone is trained

Shapes: B batch, T tokens, D model width, H query heads, G key and value heads, K channels of a
head. S: state of the recurrence `[B, H, K, K]`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.kernels import gla, softmax_attention
from gatebook.layers.language import Attention, Decoder, rotate


@dataclass(frozen=True, kw_only=True)
class LigerConfig:
    """Sizes of a LLaMA decoder, and how its attention is replaced; the defaults are the paper's."""

    vocab_size: int  # tokens
    d_model: int  # D
    n_layers: int  # blocks
    n_heads: int  # H
    n_kv_heads: int  # G
    d_ff: int  # hidden width of the feed-forward network
    rope_base: float  # of the rotary positions, in the window and in softmax attention
    norm_eps: float = 1e-5  # of every RMSNorm
    tied: bool = False  # whether the head uses the embedding's matrix
    mixer: Literal["liger", "attention"] = "liger"  # "attention" is the model before conversion
    gate: Literal["key", "none", "fresh"] = "key"  # from the key; open; from a new projection
    tau: float = 16.0  # gate temperature: log α = logsigmoid(logit) / τ
    window: int = 64  # keys that the window branch sees
    recurrent_share: float = 0.5  # weight of the recurrence; the window has the rest

    def __post_init__(self) -> None:
        if self.mixer not in ("liger", "attention"):
            raise ValueError(f"mixer must be liger or attention; got {self.mixer!r}")
        if self.gate not in ("key", "none", "fresh"):
            raise ValueError(f"gate must be key, none or fresh; got {self.gate!r}")
        if self.tau <= 0 or self.window < 1 or not 0 <= self.recurrent_share <= 1:
            raise ValueError(
                "tau is positive, window at least 1, recurrent_share from 0 to 1; got "
                f"{self.tau}, {self.window} and {self.recurrent_share}"
            )


@dataclass
class LigerState:
    """What later tokens need of those so far; its size does not grow with their number."""

    memory: Tensor | None  # S, float32; None without the recurrence
    keys: Tensor  # rotated keys of the last window − 1 tokens, [B, ≤ window − 1, G, K]
    values: Tensor  # their values
    length: int  # tokens so far


class LigerAttention(Attention):
    """Half gated linear attention, half softmax attention to a window (the paper's equation 9 f.).

        φ = softmax over the channels of a head,   log α_t = logsigmoid(k_t) / τ,
        S_t = Diag(α_t) S_{t−1} + φ(k_t)ᵀ v_t,   g_t = φ(q_t) S_t,
        ô_t = Σ_{t−w<i≤t} softmax_i(q_t k_iᵀ / √K) v_i,   o_t = ½ g_t + ½ ô_t.

    Projections, names and shapes are those of `Attention`. Rotary positions turn q and k in the
    window only. The text pools k_t into the gate; in the released code pooling is the identity, and
    τ = 16 stands in the code alone. There φ and the recurrence run in float32; here φ and v have
    the type of v (bfloat16 under autocast), gates and state float32.
    """

    def __init__(self, config: LigerConfig) -> None:
        c = config
        super().__init__(c.d_model, c.n_heads, n_kv_heads=c.n_kv_heads, rope_base=c.rope_base)
        self.kind, self.tau = c.gate, c.tau
        self.window, self.share = c.window, c.recurrent_share
        self.gate = None
        if c.gate == "fresh":  # in place of the pooled key, as in the paper's Table 6
            width = c.d_model // c.n_heads * c.n_kv_heads
            self.gate = nn.Linear(c.d_model, width, bias=False)

    def forward(self, x: Tensor, state: LigerState | None = None) -> tuple[Tensor, LigerState]:
        """`[B, T, D]` and the state to the same."""
        qkv = self.qkv(x).unflatten(-1, (sum(self.heads), -1))
        q, k, v = qkv.split(self.heads, 2)  # (B, T, H or G, K)
        memory = state.memory if state else None
        recurrent, windowed = 0.0, 0.0
        if self.share > 0:
            g = self.log_gate(k, x)
            recurrent, memory = self.recur(q, k, v, g, memory)
        past, length = 0, x.shape[1]
        if state is not None:
            past, length = state.keys.shape[1], length + state.length
        start = length - x.shape[1]
        q, k = rotate(q, self.base, start), rotate(k, self.base, start)
        if state is not None:
            k, v = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
        if self.share < 1:
            windowed = softmax_attention(q, k, v, causal=True, past=past, window=self.window)
        o = self.share * recurrent + (1 - self.share) * windowed  # (B, T, H, K)
        first = max(0, k.shape[1] - self.window + 1)
        kept = LigerState(memory, k[:, first:], v[:, first:], length)
        return self.out(o.flatten(-2)), kept

    def log_gate(self, k: Tensor, x: Tensor) -> Tensor:
        """log α `[B, T, G, K]` from keys before rotation `[B, T, G, K]` and inputs `[B, T, D]`."""
        logits = k if self.gate is None else self.gate(x).unflatten(-1, k.shape[2:])
        log_gate = F.logsigmoid(logits.to(torch.promote_types(k.dtype, torch.float32))) / self.tau
        return torch.zeros_like(log_gate) if self.kind == "none" else log_gate

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence: outputs `[B, T, H, K]` and S after them."""
        repeats = self.heads[0] // self.heads[1]
        q, k = (part.softmax(-1).to(v.dtype) for part in (q, k))
        k, v, g = (part.repeat_interleave(repeats, 2) for part in (k, v, g))
        return gla(q, k, v, g, scale=1.0, initial_state=memory, output_final_state=True)


class LigerDecoder(Decoder):
    """A LLaMA decoder; its mixer is Liger's or softmax attention."""

    def __init__(self, config: LigerConfig) -> None:
        c = config
        super().__init__(
            vocab_size=c.vocab_size,
            d_model=c.d_model,
            mixers=[self._mixer(c) for _ in range(c.n_layers)],
            d_ff=c.d_ff,
            norm_eps=c.norm_eps,
            tied=c.tied,
        )
        self.config = c

    @staticmethod
    def _mixer(c: LigerConfig) -> nn.Module:
        if c.mixer == "liger":
            return LigerAttention(c)
        return Attention(c.d_model, c.n_heads, n_kv_heads=c.n_kv_heads, rope_base=c.rope_base)


def convert(model: LigerDecoder, **changes: object) -> LigerDecoder:
    """The model with its weights copied under another mixer.

    Args:
        model: With or without Liger's attention, not yet with `LowRank` in it.
        changes: Fields of its configuration, such as `mixer`, `gate` or `window`; none that
            changes the shape of a weight.

    Returns:
        A new model; weights that the old one lacks (a fresh gate's) are as initialised.
    """
    new = LigerDecoder(dataclasses.replace(model.config, **changes))
    new.to(next(model.parameters()))
    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith("mixer.gate.weight") for name in missing):
        raise ValueError(f"the weights do not fit: {[*unexpected, *missing][:4]}")
    return new


class LowRank(nn.Module):
    """x W + (alpha / r) x A B with W frozen, for each of the parts that W's outputs consist of.

    A starts as PyTorch initialises a linear map, B at 0, so that at first nothing changes (LoRA, Hu
    et al. 2021).
    """

    def __init__(self, linear: nn.Linear, parts: list[int], rank: int, alpha: float) -> None:
        """Takes over a linear map's weight.

        Args:
            linear: Without bias.
            parts: Widths of the outputs that get a map of their own, such as those of q, k and v.
            rank: r.
            alpha: Scale.
        """
        super().__init__()
        if linear.bias is not None or sum(parts) != linear.out_features:
            raise ValueError(f"needs a linear map without bias and {sum(parts)} outputs")
        self.weight, self.scale = linear.weight.requires_grad_(False), alpha / rank
        width, like = linear.in_features, linear.weight
        a = torch.empty(len(parts), rank, width, dtype=like.dtype, device=like.device)
        self.a = nn.Parameter(a.uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.ParameterList(like.new_zeros(part, rank) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., Σ parts]`."""
        inner = F.linear(x, self.a.flatten(0, 1)).chunk(len(self.b), -1)
        change = [F.linear(h, b) for h, b in zip(inner, self.b, strict=True)]
        return F.linear(x, self.weight) + self.scale * torch.cat(change, -1)

    def merged(self) -> nn.Linear:
        """The linear map that this has become."""
        change = torch.cat([b @ a for a, b in zip(self.a, self.b, strict=True)])
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter((self.weight + self.scale * change).detach())
        return linear


def add_low_rank(
    model: LigerDecoder, rank: int = 8, alpha: float = 8.0, *, output: bool = True
) -> LigerDecoder:
    """Freezes a model in place, but for low-rank changes to its attention and any fresh gate.

    Args:
        model: Converted or not.
        rank: r of each map.
        alpha: Their scale is alpha / rank.
        output: Whether W_o has one as well as W_q, W_k and W_v; the paper's 0.085 % need it, the
            released configuration leaves it out.
    """
    c = model.config
    head = c.d_model // c.n_heads
    model.requires_grad_(False)
    for block in model.blocks:
        mixer = block.mixer
        parts = [head * heads for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
        mixer.qkv = LowRank(mixer.qkv, parts, rank, alpha)
        if output:
            mixer.out = LowRank(mixer.out, [c.d_model], rank, alpha)
        if getattr(mixer, "gate", None) is not None:
            mixer.gate.requires_grad_(True)
    return model


_LLAMA3 = LigerConfig(
    vocab_size=128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336,
    rope_base=500_000.0,
)  # fmt: skip
_MISTRAL = dataclasses.replace(_LLAMA3, vocab_size=32_000, rope_base=10_000.0)
_SMOLLM2 = LigerConfig(
    vocab_size=49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536,
    rope_base=100_000.0, tied=True,
)  # fmt: skip

MODELS = {
    "liger_llama3_8b": (LigerDecoder, _LLAMA3),
    "liger_mistral_7b": (LigerDecoder, _MISTRAL),
    "liger_smollm2_135m": (LigerDecoder, _SMOLLM2),
}
