"""Tasks with a label at each token, against loops."""

import torch

from gatebook.data.grids import IGNORE, next_marker, xor_above


def test_the_next_marker_is_the_first_one_strictly_to_the_right():
    tokens, labels = next_marker(50, 12, torch.Generator().manual_seed(0), rate=0.3)
    assert tokens.shape == (50, 1, 12, 3)
    assert torch.equal(tokens.sum(-1), torch.ones(50, 1, 12))
    for line, found in zip(tokens.argmax(-1)[:, 0].tolist(), labels[:, 0].tolist(), strict=True):
        for t, label in enumerate(found):
            later = [kind for kind in line[t + 1 :] if kind]
            assert label == (later[0] - 1 if later else IGNORE)


def test_markers_have_their_rate_and_fair_types():
    tokens, _ = next_marker(4000, 32, torch.Generator().manual_seed(0))
    blank, a, b = tokens.mean((0, 1, 2)).tolist()
    assert abs(blank - 0.85) < 0.01
    assert abs(a - b) < 0.01


def test_xor_above_by_loops():
    bits, labels = xor_above(20, 5, torch.Generator().manual_seed(0))
    assert bits.shape == (20, 5, 5, 1)
    assert set(bits.unique().tolist()) == {-1, 1}
    assert (labels[:, 0] == IGNORE).all()
    for n in range(20):
        for row in range(1, 5):
            for column in range(5):
                differ = bits[n, row, column, 0] != bits[n, row - 1, column, 0]
                assert labels[n, row, column] == int(differ)


def test_the_same_seed_gives_the_same_data():
    for task in (next_marker, xor_above):
        first, second = (task(3, 6, torch.Generator().manual_seed(5)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
