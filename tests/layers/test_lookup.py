"""The block that answers several questions at once."""

import torch

from gatebook.layers.language import Attention
from gatebook.layers.lookup import MultiLookup


def model():
    torch.manual_seed(0)
    mixer = Attention(16, 4, rope_base=0.0)
    return MultiLookup(16, mixer, 24, n_symbols=11, n_ways=3, n_values=5).double()


def test_answers_come_from_the_last_token_and_order_does_not_matter():
    lookup = model()
    symbols = torch.randint(11, (2, 6, 3), generator=torch.Generator().manual_seed(2))
    out = lookup(symbols)
    assert out.shape == (2, 3, 5)
    torch.testing.assert_close(lookup(symbols[:, [3, 1, 4, 0, 2, 5]]), out)
    symbols[:, -1, 0] = (symbols[:, -1, 0] + 1) % 11
    assert (lookup(symbols) - out).abs().max() > 1e-3


def test_the_empty_symbol_adds_nothing():
    lookup = model()
    symbols = torch.tensor([[[1, 2], [3, 4]]])
    padded = torch.tensor([[[1, 0, 2], [3, 4, 0]]])
    torch.testing.assert_close(lookup(padded), lookup(symbols))
