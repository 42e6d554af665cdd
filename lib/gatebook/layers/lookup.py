"""A block that answers several questions at once, for `gatebook.data.lookup`."""

from torch import Tensor, nn

from gatebook.layers.language import Block


class MultiLookup(nn.Module):
    """One block that reads pairs of keys and values and answers M questions at the last token.

    A token is a set of symbols: its embedding is the sum of theirs, as `multi_lookup` makes them.

    Shapes: B batch, T tokens, S symbols of a token, D model width, M ways.
    """

    def __init__(
        self,
        d_model: int,
        mixer: nn.Module,
        d_ff: int,
        *,
        n_symbols: int,
        n_ways: int,
        n_values: int,
    ) -> None:
        """Makes the model; initial weights are torch's.

        Args:
            d_model: D.
            mixer: The token mixer of the block; it must not use positions to be order-free.
            d_ff: Hidden width of the feed-forward network.
            n_symbols: Symbols, the empty one (0) included.
            n_ways: M, the keys that a question can name.
            n_values: Values that a key can have.
        """
        super().__init__()
        self.n_ways = n_ways
        self.embedding = nn.Embedding(n_symbols, d_model, padding_idx=0)
        self.block = Block(d_model, mixer, d_ff, bias=True)
        self.head = nn.Linear(d_model, n_ways * n_values)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols `[B, T, S]`, 0 for none, to logits of the values `[B, M, n_values]`."""
        x = self.embedding(symbols).sum(2)  # (B, T, D)
        x, _ = self.block(x)
        return self.head(x[:, -1]).unflatten(-1, (self.n_ways, -1))
