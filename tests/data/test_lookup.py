"""Multi-way lookup: answers, layout of the symbols, chance."""

import pytest
import torch

from gatebook.data.lookup import multi_lookup, multi_lookup_symbols

KEYS, VALUES, WAYS = 5, 3, 4


def drawn(n=200, seed=0):
    return multi_lookup(n, KEYS, VALUES, WAYS, torch.Generator().manual_seed(seed))


def test_answers_are_those_a_dictionary_gives():
    symbols, answers = drawn()
    for row, answer in zip(symbols.tolist(), answers.tolist(), strict=True):
        memory = {key - 1: value - 1 - KEYS for key, value, *_ in row[:-1]}
        assert sorted(memory) == list(range(KEYS))
        asked = [symbol - 1 - KEYS - VALUES - way * KEYS for way, symbol in enumerate(row[-1])]
        assert [memory[key] for key in asked] == answer


def test_pairs_take_two_symbols_and_the_question_all():
    symbols, answers = drawn()
    assert symbols.shape == (200, KEYS + 1, WAYS)
    assert answers.shape == (200, WAYS)
    assert (symbols[:, :-1, 2:] == 0).all()
    assert (symbols[:, -1] > KEYS + VALUES).all()
    assert symbols.max() < multi_lookup_symbols(KEYS, VALUES, WAYS) == 1 + 5 + 3 + 20


def test_values_are_uniform_wherever_they_stand_and_order_tells_nothing():
    symbols, answers = drawn(6000)
    for way in range(WAYS):
        share = torch.bincount(answers[:, way], minlength=VALUES) / 6000
        assert (share - 1 / VALUES).abs().max() < 0.03
    first = torch.bincount(symbols[:, 0, 0] - 1, minlength=KEYS) / 6000
    assert (first - 1 / KEYS).abs().max() < 0.03


def test_one_seed_gives_one_data_set_and_another_seed_another():
    assert torch.equal(drawn(seed=3)[0], drawn(seed=3)[0])
    assert not torch.equal(drawn(seed=3)[0], drawn(seed=4)[0])


def test_a_single_way_is_refused():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        multi_lookup(1, KEYS, VALUES, 1, torch.Generator())
