"""Multi-way lookup: answers, layout of the symbols, chance."""

import pytest
import torch

from gatebook.data.lookup import IGNORE, multi_lookup, multi_lookup_symbols

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


def test_ways_that_are_not_asked_have_no_symbol_and_no_answer():
    generator = torch.Generator().manual_seed(0)
    symbols, answers = multi_lookup(500, KEYS, VALUES, WAYS, generator, n_asked=2)
    asked = symbols[:, -1] > 0
    assert (asked.sum(1) == 2).all()
    assert torch.equal(asked, answers != IGNORE)
    assert (asked.float().mean(0) - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(("ways", "asked"), [(1, 0), (3, 4), (3, -1)])
def test_ways_that_do_not_fit_are_refused(ways, asked):
    with pytest.raises(ValueError, match=f"got {ways}, {asked}"):
        multi_lookup(1, KEYS, VALUES, ways, torch.Generator(), n_asked=asked)
