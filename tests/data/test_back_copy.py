"""Bigram text with back-copies: the rule, the table, the exact distributions."""

import math

import pytest
import torch

from gatebook.data.synthetic import N_TRIGGERS, BackCopy, back_copy, back_copy_triggers


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source():
    return back_copy(32, seeded())


@pytest.fixture(scope="module")
def tokens(source):
    return source.sample(2000, 16, seeded(1))


def test_every_sequence_starts_with_bos_and_has_it_nowhere_else(source, tokens):
    assert tokens.shape == (2000, 17)
    assert (tokens[:, 0] == source.bos).all()
    assert tokens[:, 1:].min() == 0
    assert tokens[:, 1:].max() == 31


def test_after_a_trigger_comes_the_token_before_it(tokens):
    """Symbol by symbol, from the rule in words."""
    copies = 0
    for row in tokens[:200].tolist():
        for t in range(2, 16):
            if row[t] < N_TRIGGERS:
                assert row[t + 1] == row[t - 1]
                copies += 1
    assert copies > 200


def test_mask_marks_triggers_that_have_a_symbol_before_them(tokens):
    mask = back_copy_triggers(tokens)
    for row, marked in zip(tokens[:50].tolist(), mask[:50].tolist(), strict=True):
        assert marked == [t >= 2 and token in (0, 1, 2, 3) for t, token in enumerate(row)]
    assert not mask[tokens[:, 1] < N_TRIGGERS, 1].any()


def test_other_symbols_follow_the_table(source, tokens):
    """Counts of pairs after symbols that are no trigger, within five standard errors."""
    last, following = tokens[:, 1:-1], tokens[:, 2:]
    for symbol in range(N_TRIGGERS, 32):
        seen = following[last == symbol]
        share = torch.bincount(seen, minlength=32) / len(seen)
        error = (source.bigram[symbol] * (1 - source.bigram[symbol]) / len(seen)).sqrt()
        assert ((share - source.bigram[symbol]).abs() <= 5 * error + 2 / len(seen)).all()


def test_a_trigger_in_the_first_place_follows_the_table(source):
    tokens = torch.tensor([[32, 2, 9]])
    torch.testing.assert_close(source.next_symbol(tokens)[0, 1], source.bigram[2])


def test_first_symbol_is_uniform(source, tokens):
    assert source.next_symbol(tokens[:1])[0, 0].tolist() == [1 / 32] * 32
    share = torch.bincount(tokens[:, 1], minlength=32) / 2000
    assert (share - 1 / 32).abs().max() < 5 * math.sqrt(1 / 32 * 31 / 32 / 2000)


def test_distributions_and_entropies_of_a_hand_worked_sequence():
    table = torch.full((5, 5), 0.2, dtype=torch.float64)
    table[4] = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=torch.float64)
    source = BackCopy(table)
    tokens = torch.tensor([[5, 4, 1, 4, 4]])  # BOS, a symbol, a trigger, its copy, a symbol
    found = source.next_symbol(tokens)[0]
    assert found[1].tolist() == [0.5, 0.5, 0, 0, 0]
    assert found[2].tolist() == [0, 0, 0, 0, 1]
    expected = [math.log(5), math.log(2), 0.0, math.log(2), math.log(2)]
    assert source.entropy(tokens)[0].tolist() == pytest.approx(expected)


def test_table_is_uniform_to_the_sixth_power_and_normed():
    source = back_copy(8, seeded(3))
    raw = torch.rand(8, 8, generator=seeded(3), dtype=torch.float64) ** 6
    for a in range(8):
        assert source.bigram[a].tolist() == pytest.approx((raw[a] / raw[a].sum()).tolist())


def test_one_seed_gives_one_data_set(source):
    first, again = (source.sample(3, 9, seeded(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, source.sample(3, 9, seeded(6)))


def test_too_few_symbols_are_refused():
    with pytest.raises(ValueError, match="n_symbols must be above the 4 triggers, got 4"):
        back_copy(4, seeded())
