"""Sparse Query Attention (Filipek 2025, arXiv 2510.01817).

Read: the author's research note and the code RxAI-dev/RxNN; of the paper itself the abstract only.

    SparseQueryAttention   the layer: fewer query heads, all of the width D / H
    SQALanguageModel       the dense models of the note, from MHA to xSQA

The layer is grouped-query attention whose head width does not follow from the number of its query
heads. So it is the book's `Attention` with `d_head` given, and no line of the operator is new.

Shapes: B batch, T tokens, D model width, H heads that fix the head width d_h = D / H, H_q query
heads, H_kv key and value heads, F hidden width of the feed-forward network, N vocabulary.
"""

from dataclasses import dataclass

from gatebook.layers.language import Attention, Decoder


@dataclass(frozen=True, kw_only=True)
class SQAConfig:
    """Sizes of a dense model; the defaults are those of the note's dense set."""

    vocab_size: int = 10_000  # N
    d_model: int = 256  # D
    n_layers: int = 8  # blocks
    n_heads: int = 16  # H, which only divides: d_h = D / H
    n_query_heads: int  # H_q, at most H
    n_kv_heads: int  # H_kv, which divides H_q
    d_ff: int = 768  # F
    rope_base: float = 10_000.0  # of the rotary positions; 0 leaves positions out

    def __post_init__(self) -> None:
        h, h_q, h_kv = self.n_heads, self.n_query_heads, self.n_kv_heads
        if not 1 <= h_kv <= h_q <= h or h_q % h_kv or self.d_model % h:
            raise ValueError(
                "1 <= n_kv_heads <= n_query_heads <= n_heads, n_kv_heads divides n_query_heads and "
                f"n_heads divides d_model; got {h_kv}, {h_q}, {h} and d_model={self.d_model}"
            )

    @property
    def d_head(self) -> int:
        """d_h = D / H, however many query heads are left."""
        return self.d_model // self.n_heads


class SparseQueryAttention(Attention):
    """O = concat_i(A_i V_g) W_O + b_O, A_i = softmax(Q_i K_gᵀ / √d_h + causal), g = ⌊i H_kv / H_q⌋.

    W_Q is `[D, H_q d_h]`, W_K and W_V are `[D, H_kv d_h]`, without biases; W_O is `[H_q d_h, D]`.
    The scores cost 2 T² H_q d_h multiply-adds: H_q / H of what they cost with H heads, and H_kv has
    no part in it.
    """

    def __init__(self, config: SQAConfig) -> None:
        super().__init__(
            config.d_model,
            config.n_query_heads,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            rope_base=config.rope_base,
            out_bias=True,
        )


def attention_flops(config: SQAConfig, length: int) -> tuple[int, int]:
    """FLOPs of a layer's forward pass on one sequence, by the note's formula.

    Args:
        config: Sizes.
        length: Tokens T.

    Returns:
        Those of the four projections, 2 T D d_h (2 H_q + 2 H_kv), and those of scores and values,
        4 T² H_q d_h (a causal kernel does half), two for a multiply-add.
    """
    d_h, h_q, h_kv = config.d_head, config.n_query_heads, config.n_kv_heads
    projections = 2 * length * config.d_model * d_h * (2 * h_q + 2 * h_kv)
    return projections, 4 * length**2 * h_q * d_h


class SQALanguageModel(Decoder):
    """Embedding, pre-norm blocks, and an untied head with a bias; no norm before the head.

    The feed-forward network is F-wide SwiGLU with biases. Initial weights are torch's.
    """

    def __init__(self, config: SQAConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            mixers=[SparseQueryAttention(config) for _ in range(config.n_layers)],
            d_ff=config.d_ff,
            init_std=None,
            biases=True,
            final_norm=False,
        )
        self.config = config


MODELS = {
    f"sqa_{name}": (SQALanguageModel, SQAConfig(n_query_heads=h_q, n_kv_heads=h_kv))
    for name, (h_q, h_kv) in {
        "mha": (16, 16),
        "gqa": (16, 4),
        "mqa": (16, 1),
        "sqa": (8, 4),  # H_q = H / 2
        "ssqa": (8, 8),  # symmetric: H_q = H_kv = H / 2
        "xsqa": (4, 4),  # extreme: H_q = H_kv = H / 4
    }.items()
}


def _half(d_model: int, n_heads: int) -> SparseQueryAttention:
    """Half of the query heads, a quarter of the key heads, at least one; for `gatebook.mixers`."""
    heads = {"n_query_heads": max(1, n_heads // 2), "n_kv_heads": max(1, n_heads // 4)}
    return SparseQueryAttention(SQAConfig(d_model=d_model, n_heads=n_heads, **heads))


MIXERS = {"sqa": lambda s: [_half(s.d_model, s.n_heads) for _ in range(s.n_layers)]}
