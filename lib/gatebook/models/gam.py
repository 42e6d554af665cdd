"""Gated Associative Memory (GAM), Acharya, arXiv:2509.00605.

A causal language model without attention: depthwise convolution and static memory. The paper's two
baselines, with the same embedding and head, are in `gam_baselines.py`.

Shape legend
    B batch, T tokens, D model width, V vocabulary, S memory slots, K convolution taps.

The abstract and the released code (github.com/rishiraj/gam: gam_model.py, benchmark.py, scale.py)
were read, the paper's body was not: the equations below are those of the code.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from gatebook.models.gam_baselines import MambaConfig, TransformerConfig

Paths = Literal["gated", "sum", "local", "global"]
Init = Literal["released", "small"]


@dataclass(frozen=True, kw_only=True)
class GAMConfig:
    """Sizes of a GAM language model; the defaults are the paper's."""

    vocab_size: int = 10_000  # V; the output matrix is tied to the token embedding
    context: int = 256  # rows of the learned position table; 0 builds a model without one
    d_model: int = 512  # D
    n_layers: int = 6
    n_slots: int = 512  # S, rows of the memory; every layer has its own
    kernel_size: int = 3  # K, taps of the causal depthwise convolution
    dropout: float = 0.1  # on the embeddings and on the output of each feed-forward network
    paths: Paths = "gated"  # "gated" is GAM; the others are the arms of its ablation (Table 3)
    init: Init = "released"  # see `init_embeddings`


class LocalPath(nn.Module):
    """Causal depthwise convolution, l_t = sum_{i<K} w_i * u_{t-i} + b, without an activation.

    The only operation of GAM that reads another position.
    """

    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.conv = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model)

    def forward(self, u: Tensor, past: Tensor | None = None) -> Tensor:
        """Convolves.

        Args:
            u: Inputs, [B, T, D].
            past: The K - 1 inputs before them, [B, K-1, D]; zeros when left out.

        Returns:
            [B, T, D]. The code pads both sides by K - 1 and cuts to T, which is the same.
        """
        length = u.shape[1]
        padded = F.pad(u, (0, 0, self.kernel_size - 1, 0)) if past is None else cat_time(past, u)
        taps = self.conv.weight.squeeze(1).T  # (K, D); tap K-1 multiplies the current token
        out = self.conv.bias + taps[0] * padded[:, :length]
        for i in range(1, self.kernel_size):
            out = out + taps[i] * padded[:, i : i + length]
        return out


class GlobalPath(nn.Module):
    """Read of a static memory, m_t = softmax(u_t M^T) M, with M of shape [S, D].

    M is a parameter: key and value at once, the same for every sequence. The softmax runs over the
    slots, without a scale and without heads, so that m_t is a function of u_t alone.
    """

    def __init__(self, d_model: int, n_slots: int) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.empty(n_slots, d_model))
        nn.init.xavier_uniform_(self.bank)

    def forward(self, u: Tensor) -> Tensor:
        """Reads the memory at each position: [B, T, D] -> [B, T, D]."""
        weights = torch.softmax(u @ self.bank.T, dim=-1)  # (B, T, S)
        return weights @ self.bank


class GAM(nn.Module):
    """Both paths and their fusion: f = sigmoid(a) * l + sigmoid(c) * m, (a, c) = u W_g + b_g.

    The two gates are independent, not a convex mixture. `paths` selects an arm of the ablation:
    "sum" drops the gates (f = l + m); "local" and "global" keep one path and its gate, which is the
    limit c -> -inf and a -> -inf of the whole.
    """

    def __init__(self, config: GAMConfig) -> None:
        super().__init__()
        if config.paths not in ("gated", "sum", "local", "global"):
            raise ValueError(f"paths: {config.paths!r} is not one of gated, sum, local, global")
        self.paths = config.paths
        self.n_gates = {"gated": 2, "sum": 0, "local": 1, "global": 1}[config.paths]
        if config.paths != "global":
            self.local_path = LocalPath(config.d_model, config.kernel_size)
        if config.paths != "local":
            self.global_path = GlobalPath(config.d_model, config.n_slots)
        if self.n_gates:
            self.gate = nn.Linear(config.d_model, self.n_gates * config.d_model)

    def forward(self, u: Tensor, past: Tensor | None = None) -> Tensor:
        """Mixes.

        Args:
            u: Normed inputs, [B, T, D].
            past: Normed inputs of the K - 1 positions before, [B, K-1, D], or None at the start.

        Returns:
            f, [B, T, D]. There is no output projection.
        """
        read = []
        if self.paths != "global":
            read.append(self.local_path(u, past))
        if self.paths != "local":
            read.append(self.global_path(u))
        if self.n_gates:
            gates = torch.sigmoid(self.gate(u)).chunk(self.n_gates, dim=-1)  # (B, T, D) each
            read = [gate * path for gate, path in zip(gates, read, strict=True)]
        return sum(read)


class FeedForward(nn.Sequential):
    """Linear to 4D, GELU, Linear to D, dropout; [B, T, D] -> [B, T, D]."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
            nn.Dropout(dropout),
        )


class Block(nn.Module):
    """Pre-norm residual block around a mixer: x + mixer(LN x), then x + FFN(LN x)."""

    def __init__(self, mixer: nn.Module, d_model: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.mixer(self.norm1(x))
        return x + self.ffn(self.norm2(x))

    def step(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One token of a GAM block, x of [B, 1, D] and its buffer of [B, K-1, D]; returns both."""
        u = self.norm1(x)
        x = x + self.mixer(u, past)
        return x + self.ffn(self.norm2(x)), cat_time(past, u)[:, 1:]


class Embedding(nn.Module):
    """Token embedding plus learned absolute position, then dropout."""

    def __init__(self, config: "GAMConfig | TransformerConfig | MambaConfig") -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        if config.context:
            self.position = nn.Embedding(config.context, config.d_model)
        self.context = config.context
        self.dropout = nn.Dropout(config.dropout)
        init_embeddings(self, config.init)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Embeds.

        Args:
            tokens: Token ids, [B, T].
            start: Position of the first one.

        Returns:
            [B, T, D].

        Raises:
            ValueError: When the position table is too short.
        """
        x = self.token(tokens)
        if self.context:
            if start + tokens.shape[1] > self.context:
                raise ValueError(
                    f"{start + tokens.shape[1]} positions, the table has {self.context}"
                )
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
            x = x + self.position(positions)
        return self.dropout(x)


def init_embeddings(embedding: Embedding, init: Init) -> None:
    """Initialises both tables.

    Args:
        embedding: Changed in place.
        init: "released": the token table is created by a tied `nn.Linear` and so is uniform in
            +-D^-1/2 (standard deviation 0.026 at D = 512), while positions keep `nn.Embedding`'s
            N(0, 1) and drown it 40 to 1. "small": both N(0, 0.02).

    Raises:
        ValueError: On another name.
    """
    if init not in ("released", "small"):
        raise ValueError(f"init: {init!r} is not one of released, small")
    bound = embedding.token.embedding_dim**-0.5
    if init == "small":
        nn.init.normal_(embedding.token.weight, std=0.02)
    else:
        nn.init.uniform_(embedding.token.weight, -bound, bound)
    if embedding.context:
        nn.init.normal_(embedding.position.weight, std=0.02 if init == "small" else 1.0)


class LanguageModel(nn.Module):
    """Embedding, blocks, final LayerNorm, and logits through the transposed token embedding."""

    def __init__(
        self, config: "GAMConfig | TransformerConfig | MambaConfig", blocks: list[nn.Module]
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.d_model)

    def trunk(self, x: Tensor) -> Tensor:
        """Blocks and final norm: embedded tokens [B, T, D] -> [B, T, D]."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]."""
        return features @ self.embedding.token.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits: tokens [B, T] -> [B, T, V]."""
        return self.logits(self.trunk(self.embedding(tokens)))


class GAMLanguageModel(LanguageModel):
    """The paper's model: `n_layers` blocks of GAM and a feed-forward network."""

    def __init__(self, config: GAMConfig) -> None:
        d, dropout = config.d_model, config.dropout
        super().__init__(config, [Block(GAM(config), d, dropout) for _ in range(config.n_layers)])

    @property
    def receptive_field(self) -> int:
        """Tokens that an output reads, itself included: 1 + L (K - 1); 1 without convolutions."""
        reach = 0 if self.config.paths == "global" else self.config.kernel_size - 1
        return 1 + self.config.n_layers * reach

    def empty_buffers(self, batch: int) -> list[Tensor]:
        """The decoding state before the first token: L zero tensors of [B, K-1, D]."""
        weight = self.embedding.token.weight
        shape = (batch, self.config.kernel_size - 1, self.config.d_model)
        return [weight.new_zeros(shape) for _ in self.blocks]

    def step(
        self, tokens: Tensor, buffers: list[Tensor], position: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Decodes one token; the state does not grow with the position.

        Args:
            tokens: Current tokens, [B].
            buffers: State after the previous token, one [B, K-1, D] for each layer.
            position: Index of the current token.

        Returns:
            Logits [B, V] and the new state.
        """
        x = self.embedding(tokens[:, None], start=position)
        after = []
        for block, past in zip(self.blocks, buffers, strict=True):
            x, past = block.step(x, past)
            after.append(past)
        return self.logits(self.norm(x))[:, 0], after


class LagReader(nn.Module):
    """A language model's trunk with one linear output for each of several lags.

    Ours, for the copying task of the chapter; the output matrix is not tied.
    """

    def __init__(self, model: LanguageModel, n_lags: int) -> None:
        super().__init__()
        self.model, self.n_lags = model, n_lags
        self.head = nn.Linear(model.config.d_model, n_lags * model.config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the symbol seen each lag ago: tokens [B, T] -> [B, T, n_lags, V]."""
        features = self.model.trunk(self.model.embedding(tokens))
        return self.head(features).unflatten(-1, (self.n_lags, -1))


def cat_time(past: Tensor, present: Tensor) -> Tensor:
    """[B, P, D] and [B, T, D] -> [B, P+T, D]."""
    return torch.cat([past, present], dim=1)


MODELS = {
    "gam": (GAMLanguageModel, GAMConfig()),  # Table 1: 22.6M
}
