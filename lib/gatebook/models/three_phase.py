"""Three-Phase Transformer (Abu Ayyash 2026, arXiv 2604.14430).

The residual stream of width D is cut into N contiguous phases of width D / N. A decoder block is

    h ← h + GQA(norm_1(h)),    h ← R(h),    h ← h + SwiGLU(norm_2(h)),

with a norm for each phase, and a rotation R that turns phase i by 2π i / N more than phase 0. The
embedding's output has a fixed mean at each position, the horn.

    PhaseNorm          RMSNorm of each phase; one phase is the usual RMSNorm
    PhaseRotation      R, with D / (2N) learned angles for a layer
    set_mean           the horn
    ThreePhaseDecoder  all of it; each part can be left out, which leads to the RoPE-only baseline

The baseline's code was not released: it is the text's description, down to an embedding that is
multiplied by √D (§4.11), which the three-phase model's is not.

Shapes: B batch, T tokens, P tokens before them, D model width, N phases, F hidden width of the
feed-forward network, H query heads, G key and value heads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.layers.language import Attention, SwiGLU

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ThreePhaseConfig:
    """Sizes and parts; the defaults are the paper's full method."""

    vocab_size: int  # tokens
    d_model: int  # D
    n_layers: int  # L, blocks
    d_ff: int  # F
    n_heads: int  # H
    n_kv_heads: int  # G
    n_phases: int = 3  # N; D / N is even
    norm: Literal["phase", "global"] = "phase"  # RMSNorm of each phase, or of the whole width
    rotation: Literal["overwrite", "add", "none"] = "overwrite"  # h ← R(h), h ← h + R(h), h ← h
    horn: bool = True  # whether the embedding's mean at position t is set to 1 / (t + 1)
    scale_embedding: bool = False  # whether the embedding is multiplied by √D
    rope_base: float = 10_000.0  # of the rotary positions
    norm_eps: float = 1e-6  # of every norm

    def __post_init__(self) -> None:
        if self.n_phases < 1 or self.d_model % (2 * self.n_phases):
            raise ValueError(
                f"n_phases must be at least 1 and cut d_model into even widths; got "
                f"{self.n_phases} and {self.d_model}"
            )
        if self.norm not in ("phase", "global"):
            raise ValueError(f"norm must be phase or global; got {self.norm!r}")
        if self.rotation not in ("overwrite", "add", "none"):
            raise ValueError(f"rotation must be overwrite, add or none; got {self.rotation!r}")


class PhaseNorm(nn.Module):
    """RMSNorm of each of N phases, side by side, with one gain for each channel."""

    def __init__(self, d_model: int, n_phases: int, eps: float) -> None:
        super().__init__()
        self.n_phases, self.eps = n_phases, eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        phases = x.unflatten(-1, (self.n_phases, -1))  # (..., N, D/N)
        return F.rms_norm(phases, phases.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class PhaseRotation(nn.Module):
    """R: in phase i, channels 2k and 2k + 1 turn by θ_k + 2π i / N.

    θ is shared by the phases and starts at (ℓ + 1) π / (2L) in layer ℓ, counted from 0.
    """

    def __init__(self, d_model: int, n_phases: int, start: float) -> None:
        super().__init__()
        self.n_phases, self.start = n_phases, start
        self.theta = nn.Parameter(torch.full((d_model // n_phases // 2,), start))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same, with the norm of every pair kept."""
        phase = torch.arange(self.n_phases, device=x.device, dtype=self.theta.dtype)
        angle = self.theta + 2 * math.pi / self.n_phases * phase[:, None]  # (N, D/2N)
        cos, sin = angle.cos().flatten().to(x.dtype), angle.sin().flatten().to(x.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (..., D/2), phase after phase
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def drift(self) -> float:
        """Mean distance of the angles from their start, in radians."""
        return (self.theta.detach() - self.start).abs().mean().item()


def set_mean(x: Tensor, first: int = 0) -> Tensor:
    """The horn: adds to all channels of position t what makes their mean 1 / (t + 1).

    Args:
        x: `[B, T, D]`.
        first: Position of the first token, counted from 0.

    Returns:
        `[B, T, D]`.
    """
    places = torch.arange(first + 1, first + x.shape[1] + 1, device=x.device, dtype=x.dtype)
    return x + (1 / places[:, None] - x.mean(-1, keepdim=True))


class ThreePhaseBlock(nn.Module):
    """Attention, rotation and feed-forward network, in this order."""

    def __init__(self, config: ThreePhaseConfig, layer: int) -> None:
        super().__init__()
        c = config
        phases = c.n_phases if c.norm == "phase" else 1
        self.mixer_norm = PhaseNorm(c.d_model, phases, c.norm_eps)
        self.mixer = Attention(c.d_model, c.n_heads, n_kv_heads=c.n_kv_heads, rope_base=c.rope_base)
        self.added = c.rotation == "add"
        self.rotation = None
        if c.rotation != "none":
            start = (layer + 1) * math.pi / (2 * c.n_layers)
            self.rotation = PhaseRotation(c.d_model, c.n_phases, start)
        self.ffn_norm = PhaseNorm(c.d_model, phases, c.norm_eps)
        self.ffn = SwiGLU(c.d_model, c.d_ff)

    def forward(self, h: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`[B, T, D]` and the keys and values so far to the same."""
        mixed, state = self.mixer(self.mixer_norm(h), state)
        h = h + mixed
        if self.rotation is not None:
            h = h + self.rotation(h) if self.added else self.rotation(h)
        return h + self.ffn(self.ffn_norm(h)), state


class ThreePhaseDecoder(nn.Module):
    """Embedding with horn, blocks, norm and an untied head; nothing has a bias.

    Initial weights are PyTorch's defaults, as in the release: the embedding N(0, 1), linear maps
    uniform within ± fan_in^(-1/2).
    """

    def __init__(self, config: ThreePhaseConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(ThreePhaseBlock(c, layer) for layer in range(c.n_layers))
        self.norm = PhaseNorm(c.d_model, c.n_phases if c.norm == "phase" else 1, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, T]` to logits `[B, T, vocab_size]`."""
        return self.continue_from(tokens, None)[0]

    def continue_from(
        self, tokens: Tensor, states: list[State] | None
    ) -> tuple[Tensor, list[State]]:
        """Logits for tokens that follow others.

        Args:
            tokens: Token ids `[B, T]`.
            states: What the call on the P tokens before returned; None at the start. The horn goes
                on at position P, where the release starts again at 0 with every new token.

        Returns:
            Logits `[B, T, vocab_size]` and each layer's keys and values.
        """
        past = 0 if states is None else states[0][0].shape[1]
        h = self.embed(tokens, past)
        after = []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            h, state = block(h, state)
            after.append(state)
        return self.head(self.norm(h)), after

    def embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Token ids `[B, T]` to what enters the first block, `[B, T, D]`."""
        h = self.embedding(tokens)
        if self.config.scale_embedding:
            h = h * self.config.d_model**0.5
        return set_mean(h, first) if self.config.horn else h


_123M = {"vocab_size": 32_000, "d_model": 768, "n_layers": 12, "d_ff": 2048, "n_heads": 12}
_5M = {"vocab_size": 10_000, "d_model": 192, "n_layers": 4, "d_ff": 512, "n_heads": 6}
_ROPE_ONLY = {"norm": "global", "rotation": "none", "horn": False, "scale_embedding": True}

MODELS = {
    f"{kind}_{size}": (ThreePhaseDecoder, ThreePhaseConfig(**sizes, n_kv_heads=3, **parts))
    for kind, parts in (("three_phase", {}), ("rope_only", _ROPE_ONLY))
    for size, sizes in (("123m", _123M), ("5m", _5M))
}
