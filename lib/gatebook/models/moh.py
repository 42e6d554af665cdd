"""MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al. 2024, arXiv 2410.11842).

Read in the paper: sections 3 to 5 and appendices B and C. From the code SkyworkAI/MoH: the scales
of the weights and of the balance loss, which differ from the text (`form`).

    HeadRouter         a weight for every head at every token, 0 for most of the routed heads
    NormRouter         the router without parameters, for a model that was trained without one
    MoHAttention       softmax attention whose heads are weighted before W_O
    MoHLanguageModel   the decoder of the paper's language models, and its baseline
    sparse_attention   the same outputs without the work of inactive heads

Shapes: B batch, T tokens, D model width, H heads, of which h_s are shared and E = H - h_s routed, K
routed heads active at a token, d_h width of a head, F hidden width, N vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gatebook.layers.language import Attention, Decoder


@dataclass(frozen=True, kw_only=True)
class MoHConfig:
    """Sizes and choices of a language model."""

    vocab_size: int = 65_536  # N; not given, inferred from the parameters of both sizes
    d_model: int  # D
    n_layers: int  # blocks
    n_heads: int  # H
    n_kv_heads: int = 0  # key and value heads; 0 is H
    d_head: int = 0  # d_h; 0 is D / H
    d_ff: int  # F
    router: Literal["learned", "frozen", "norm", "none"] = "learned"  # none: plain attention
    n_shared: int = 0  # h_s, heads that every token uses
    n_active: int = 0  # K, routed heads that a token uses
    form: Literal["code", "paper"] = "code"  # scales of the weights and of the balance loss
    two_stage: bool = True  # whether α depends on the token; else both are 1/2
    balance: float = 0.01  # β, weight of the load-balance loss
    rope_base: float = 10_000.0  # of the rotary positions; 0 leaves positions out
    init_std: float = 0.02  # of every linear map and of the embedding

    def __post_init__(self) -> None:
        for name, allowed in (
            ("router", ("learned", "frozen", "norm", "none")),
            ("form", ("code", "paper")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")
        if self.router != "none":
            _check_heads(self.n_heads, self.n_shared, self.n_active)


def _check_heads(n_heads: int, n_shared: int, n_active: int) -> None:
    routed = n_heads - n_shared
    if not 0 <= n_shared <= n_heads or not bool(routed) <= n_active <= routed:
        raise ValueError(
            "n_shared is at most n_heads, n_active from 1 to the n_heads - n_shared routed heads "
            f"(0 if there are none); got {n_shared} and {n_active} of {n_heads}"
        )


def top_mask(scores: Tensor, k: int) -> Tensor:
    """True for the k largest along the last axis, exactly k even where scores are equal."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k).indices, True)


class HeadRouter(nn.Module):
    """The weights g of the heads, from the attention's input x (equations 5 to 7 of the text).

    paper   [α_1, α_2] = softmax(W_h x); shared heads α_1 softmax(W_s x), routed heads
            α_2 softmax(W_r x) ⊙ m, with m the mask of the K largest of W_r x
    code    2 α_1 h_s softmax(W_s x) and 2 α_2 K (p ⊙ m) / (p · m), p = softmax(W_r x), so that
            zero weights give every active head exactly 1

    Where all heads are shared, or all routed, that kind has no α: its weight is that of 2 α = 1 in
    the code's form, of α = 1 in the paper's. All heads shared and only one of them needs no router.

    A forward pass leaves β times the load-balance loss in `auxiliary_loss`: Σ_i f_i P_i (text) or
    E Σ_i f_i P_i (code), with f_i the fraction of tokens that use routed head i, and P_i the mean
    of p_i. Only P carries a gradient.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_shared: int,
        n_active: int,
        form: str = "code",
        two_stage: bool = True,
        frozen: bool = False,
        balance: float = 0.01,
    ) -> None:
        """Makes the router.

        Args:
            d_model: D.
            n_heads: H.
            n_shared: h_s.
            n_active: K.
            form: "code" or "paper".
            two_stage: Whether α depends on the token; else both are 1/2.
            frozen: A control: routed heads are chosen by a random map that is not trained, with
                equal weights.
            balance: β.

        Raises:
            ValueError: Numbers of heads that do not fit.
        """
        super().__init__()
        _check_heads(n_heads, n_shared, n_active)
        routed = n_heads - n_shared
        self.sizes, self.n_active = (n_shared, routed), n_active
        self.form, self.frozen, self.balance = form, frozen, balance
        self.auxiliary_loss: Tensor | float = 0.0
        self.shared = self.routed = self.stage = None  # W_s, W_r, W_h, where there is a choice
        if n_shared and n_heads > 1:
            self.shared = nn.Linear(d_model, n_shared, bias=False)
        if routed and frozen:
            self.register_buffer("choice", torch.randn(routed, d_model))
        elif routed:
            self.routed = nn.Linear(d_model, routed, bias=False)
        if n_shared and routed and two_stage:
            self.stage = nn.Linear(d_model, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to the weights g `[B, T, H]`, shared heads first, in float32 or wider."""
        weights = []
        first, second = self._stages(x)
        if self.sizes[0]:
            ones = x.new_ones(*x.shape[:-1], 1)
            p = _softmax(self.shared(x)) if self.shared is not None else ones
            weights.append(first * (self.sizes[0] if self.form == "code" else 1) * p)
        if self.sizes[1]:
            p, mask = self._choose(x)
            self.auxiliary_loss = self.balance * self.load_balance(p, mask)
            kept = p * mask
            if self.form == "code":
                kept = self.n_active * kept / kept.sum(-1, keepdim=True)
            weights.append(second * kept)
        return torch.cat(weights, -1)

    def _stages(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Factors of shared and routed heads: 2 α in the code's form, α in the text's."""
        if self.stage is not None:
            alpha = (2 if self.form == "code" else 1) * _softmax(self.stage(x))
            return alpha[..., :1], alpha[..., 1:]
        whole = self.form == "code" or 0 in self.sizes
        return (1.0, 1.0) if whole else (0.5, 0.5)

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p and the mask m of the active routed heads, both `[B, T, E]`."""
        if self.frozen:
            scores = x.detach() @ self.choice.to(x.dtype).T
            return torch.full_like(scores, 1 / self.sizes[1]), top_mask(scores, self.n_active)
        p = _softmax(self.routed(x))
        return p, top_mask(p, self.n_active)

    def load_balance(self, p: Tensor, mask: Tensor) -> Tensor:
        """Σ_i f_i P_i, times E in the code's form."""
        axes = tuple(range(p.ndim - 1))
        loss = (mask.to(p.dtype).mean(axes) * p.mean(axes)).sum()
        return self.sizes[1] * loss if self.form == "code" else loss


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class NormRouter(nn.Module):
    """Weights without parameters, for continued training of a model without routers.

    Shared heads have weight 1. The score of a routed head is the norm of its query before rotation,
    over the standard deviation of these norms; p = softmax of it. Forward the weight is 1 for the K
    largest and 0 else; backward it is p (straight through).
    """

    def __init__(self, n_heads: int, *, n_shared: int, n_active: int) -> None:
        """Makes the router of H = n_heads heads, h_s = n_shared and K = n_active."""
        super().__init__()
        _check_heads(n_heads, n_shared, n_active)
        self.n_shared, self.n_active = n_shared, n_active

    def forward(self, q: Tensor) -> Tensor:
        """Queries `[B, T, H, d_h]` to the weights `[B, T, H]`."""
        norms = q.norm(dim=-1)
        routed = norms[..., self.n_shared :]
        p = _softmax(routed / routed.std(-1, keepdim=True))
        mask = top_mask(p, self.n_active).to(p.dtype)
        return torch.cat(
            [torch.ones_like(norms[..., : self.n_shared]), p + (mask - p).detach()], -1
        )


class MoHAttention(Attention):
    """MoH(X)_t = Σ_i g_{i,t} H^i_t W_O^i, where H^i is the output of head i (equation 4)."""

    def __init__(self, config: MoHConfig) -> None:
        c = config
        super().__init__(
            c.d_model,
            c.n_heads,
            n_kv_heads=c.n_kv_heads,
            d_head=c.d_head,
            rope_base=c.rope_base,
        )
        heads = {"n_shared": c.n_shared, "n_active": c.n_active}
        self.by_query = c.router == "norm"
        if self.by_query:
            self.router = NormRouter(c.n_heads, **heads)
        else:
            self.router = HeadRouter(
                c.d_model,
                c.n_heads,
                **heads,
                form=c.form,
                two_stage=c.two_stage,
                frozen=c.router == "frozen",
                balance=c.balance,
            )

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`[B, T, D]` to the same; the state is the keys and values so far, of every head."""
        q, k, v = self.project(x)
        o, state = self.attend(q, k, v, state)  # (B, T, H, d_h)
        weights = self.router(q if self.by_query else x).to(o.dtype)
        return self.out((weights[..., None] * o).flatten(-2)), state


class MoHLanguageModel(Decoder):
    """Embedding, blocks of attention and SwiGLU, norm and an untied head."""

    def __init__(self, config: MoHConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            mixers=[self._mixer(config) for _ in range(config.n_layers)],
            d_ff=config.d_ff,
            init_std=config.init_std,
        )
        self.config = config

    @staticmethod
    def _mixer(config: MoHConfig) -> nn.Module:
        if config.router != "none":
            return MoHAttention(config)
        return Attention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            rope_base=config.rope_base,
        )


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, active: Tensor) -> Tensor:
    """Causal attention that computes a head's output only at the tokens that use it.

    What is saved is the work of those queries: keys and values of every head are still read by the
    tokens that use it.

    Args:
        q, k, v: `[B, T, H, d_h]`, already turned.
        active: Whether token t uses head h, `[B, T, H]`, bool.

    Returns:
        The outputs `[B, T, H, d_h]`, 0 where a head is not active.
    """
    out = torch.zeros_like(v)
    places = torch.arange(q.shape[1], device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            rows = active[b, :, h].nonzero().flatten()
            scores = q[b, rows, h] @ k[b, :, h].T * q.shape[-1] ** -0.5
            scores = scores.masked_fill(places > rows[:, None], float("-inf"))
            out[b, rows, h] = scores.softmax(-1) @ v[b, :, h]
    return out


MODELS = {
    "moh_llm_s": (
        MoHLanguageModel,
        MoHConfig(d_model=768, n_layers=12, n_heads=12, d_ff=2048, n_shared=3, n_active=3),
    ),
    "moh_llm_b": (
        MoHLanguageModel,
        MoHConfig(d_model=1536, n_layers=24, n_heads=16, d_ff=4096, n_shared=6, n_active=6),
    ),
}


def _half(d_model: int, n_heads: int) -> MoHAttention:
    """Twice the heads at half the width, of which a quarter is shared and a quarter routed and
    active, for `gatebook.mixers`. One head of a kind would leave its router nothing to weigh."""
    heads = {"n_heads": 2 * n_heads, "n_shared": n_heads // 2, "n_active": n_heads // 2}
    return MoHAttention(MoHConfig(d_model=d_model, n_layers=1, d_ff=1, **heads))


MIXERS = {"moh": lambda s: [_half(s.d_model, s.n_heads) for _ in range(s.n_layers)]}
