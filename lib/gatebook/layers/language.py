"""Parts of causal language models: the decoder, softmax attention, rotary positions, SwiGLU.

A token mixer of this book is a module with `mixer(x, state=None) -> (y, state)`: x and y are
`[B, T, D]`, and the state holds what later tokens need of those so far (keys and values, a matrix,
the last few inputs); None stands for the start of a sequence. `Decoder` stacks any mixer.

Shapes: B batch, T tokens, P tokens before them, D model width, H query heads, G key and value
heads, K channels of a head, F hidden width of the feed-forward network, N vocabulary, W taps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.kernels import softmax_attention

State = Any


def rotate(x: Tensor, base: float, start: int = 0) -> Tensor:
    """Rotary positions (Su et al. 2021): channels i and i + D/2 of token t turn by t base^(-2i/D).

    Args:
        x: `[B, T, H, D]`, D even.
        base: The largest period is about 2π base tokens.
        start: Position of the first token.

    Returns:
        The rotated `[B, T, H, D]`, in the type of x.
    """
    half = x.shape[-1] // 2
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    positions = torch.arange(start, start + x.shape[1], device=x.device)
    angle = positions.view(-1, 1, 1) * rate  # (T, 1, D/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` that keeps to autocast's type, as linear maps do.

    torch's own leaves float32 activations in float32, of which every linear map then makes a copy,
    and falls back to many small kernels for bfloat16 activations with a float32 weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same, in autocast's type where it is on; the mean is in float32."""
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(kind)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions and, if wanted, grouped queries (LLaMA's)."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int = 0,
        d_head: int = 0,
        rope_base: float = 10_000.0,
        out_bias: bool = False,
    ) -> None:
        """Makes the layer.

        Args:
            d_model: D.
            n_heads: H, the query heads.
            n_kv_heads: G, which divides H; 0 is H. Query head i reads key head ⌊i G / H⌋.
            d_head: K; 0 is D / H.
            rope_base: Of `rotate`; 0 leaves positions out.
            out_bias: Whether the output map has a bias; queries, keys and values have none.

        Raises:
            ValueError: Heads that do not divide what they have to.
        """
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        if n_heads % n_kv_heads or (not d_head and d_model % n_heads):
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads and divide d_model, unless d_head is "
                f"given; got {n_heads}, {n_kv_heads} and {d_model}"
            )
        d_head = d_head or d_model // n_heads
        self.heads, self.base = (n_heads, n_kv_heads, n_kv_heads), rope_base
        self.qkv = nn.Linear(d_model, sum(self.heads) * d_head, bias=False)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=out_bias)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`[B, T, D]` to the same; the state is the keys and values so far, `[B, P, G, K]` each."""
        o, state = self.attend(*self.project(x), state)
        return self.out(o.flatten(-2)), state

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, T, D]` to queries `[B, T, H, K]`, keys and values `[B, T, G, K]`, not yet turned."""
        return self.qkv(x).unflatten(-1, (sum(self.heads), -1)).split(self.heads, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The heads' outputs `[B, T, H, K]` and the state after them, from what `project` gave."""
        past = 0 if state is None else state[0].shape[1]
        if self.base:
            q, k = rotate(q, self.base, past), rotate(k, self.base, past)
        if state is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(state, (k, v), strict=True))
        return softmax_attention(q, k, v, causal=True, past=past), (k, v)


class ShortConv(nn.Module):
    """Causal depthwise convolution over time, without bias: y_t = Σ_{i<W} w_i ⊙ x_{t−i}."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, T, C]` to the same; the state is the last W − 1 inputs `[B, W − 1, C]`."""
        if state is None:
            state = x.new_zeros(x.shape[0], self.width - 1, x.shape[2])
        padded = torch.cat([state.to(x.dtype), x], 1)
        y = self.conv(padded.mT).mT if x.is_cuda else self._tap_by_tap(padded, x.shape[1])
        return y, padded[:, x.shape[1] :]

    def _tap_by_tap(self, padded: Tensor, length: int) -> Tensor:
        """The same as sums: many times faster than torch's depthwise convolution on a CPU."""
        taps = self.conv.weight.squeeze(1).T.to(padded.dtype)  # (W, C), the newest input last
        return sum(tap * padded[:, i : i + length] for i, tap in enumerate(taps))


class Convolved(nn.Module):
    """A mixer that sees its input after a causal convolution and SiLU.

    A control: it gives every mixer the short memory that some, such as the delta rules, have as
    published, so that what is left between them is not that memory.
    """

    def __init__(self, mixer: nn.Module, d_model: int, width: int) -> None:
        super().__init__()
        self.conv, self.mixer = ShortConv(d_model, width), mixer

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """`[B, T, D]` to the same; the state is the convolution's and the mixer's."""
        rows, past = state or (None, None)
        y, rows = self.conv(x, rows)
        y, past = self.mixer(F.silu(y), past)
        return y, (rows, past)


class SwiGLU(nn.Module):
    """The feed-forward network (SiLU(x W_1) ⊙ x W_2) W_3, with biases if wanted."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def llama_width(d_model: int) -> int:
    """LLaMA's hidden width of the feed-forward network, 256 ⌈8 D / (3 · 256)⌉."""
    return 256 * -(-8 * d_model // (3 * 256))


class Block(nn.Module):
    """y = x + mixer(norm(x)); x' = y + SwiGLU(norm(y))."""

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        d_ff: int,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer
        self.ffn_norm = RMSNorm(d_model, eps=norm_eps)
        self.ffn = SwiGLU(d_model, d_ff, bias)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """`[B, T, D]` and the mixer's state to the same."""
        mixed, state = self.mixer(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), state


class Decoder(nn.Module):
    """Embedding, blocks, norm and a linear head; positions are the mixers' own affair."""

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        mixers: list[nn.Module],
        d_ff: int = 0,
        norm_eps: float = 1e-6,
        init_std: float | None = 0.02,
        tied: bool = False,
        biases: bool = False,
        final_norm: bool = True,
    ) -> None:
        """Makes the model.

        Args:
            vocab_size: N.
            d_model: D.
            mixers: One for each block. Their linear maps are initialised here; a mixer that wants
                another start for one of its modules gives that module a method `reset`.
            d_ff: F; 0 is `llama_width`.
            norm_eps: Of every RMSNorm of the trunk.
            init_std: Standard deviation of every linear map and of the embedding; biases are 0.
                None leaves torch's own initial weights.
            tied: Whether the head uses the embedding's matrix.
            biases: Whether the feed-forward networks and the head have biases.
            final_norm: Whether a norm stands before the head.
        """
        super().__init__()
        self.init_std = init_std
        d_ff = d_ff or llama_width(d_model)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(d_model, mixer, d_ff, norm_eps, biases) for mixer in mixers
        )
        self.norm = RMSNorm(d_model, eps=norm_eps) if final_norm else nn.Identity()
        self.head = nn.Linear(d_model, vocab_size, bias=biases)
        if tied:
            self.head.weight = self.embedding.weight
        if init_std is not None:
            self.apply(self._initialise)
        self.apply(lambda module: module.reset() if hasattr(module, "reset") else None)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, T]` to logits `[B, T, N]`."""
        x = self.embedding(tokens)  # (B, T, D)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))

    def continue_from(self, tokens: Tensor, states: list[State] | None) -> tuple[Tensor, list]:
        """Logits for tokens that follow others, from the mixers' states instead of those tokens.

        Args:
            tokens: Token ids `[B, T]`.
            states: What the call on the tokens before returned; None at the start.

        Returns:
            Logits `[B, T, N]` and the state of each mixer. Detach the states to train on segments
            of a long sequence.
        """
        x = self.embedding(tokens)
        states = states or [None] * len(self.blocks)
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state)
            after.append(state)
        return self.head(self.norm(x)), after
