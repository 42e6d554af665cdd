"""Causal softmax attention, with and without rotary positions."""

from gatebook.layers.language import Attention

MIXERS = {
    "softmax": lambda s: [Attention(s.d_model, s.n_heads) for _ in range(s.n_layers)],
    "softmax_nope": lambda s: [
        Attention(s.d_model, s.n_heads, rope_base=0.0) for _ in range(s.n_layers)
    ],
}
