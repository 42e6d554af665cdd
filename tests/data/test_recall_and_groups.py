"""Associative recall, copying, and the word problems of groups."""

import itertools

import pytest
import torch

from gatebook.data.groups import group_table, group_words
from gatebook.data.recall import (
    associative_recall,
    copying,
    recall_in_chain,
    second_order_chain,
)
from gatebook.data.synthetic import IGNORE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "pairs"), [(24, 8), (30, 8), (64, 5)])
def test_every_query_has_the_value_of_its_key(length, pairs):
    tokens, targets = associative_recall(50, length, pairs, 9, 7, generator())
    assert tokens.shape == targets.shape == (50, length)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        memory = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(memory) == pairs
        assert all(1 <= key <= 9 for key in memory)
        assert all(10 <= value <= 16 for value in memory.values())
        asked = [t for t, answer in enumerate(answers) if answer != IGNORE]
        assert min(asked) >= 2 * pairs
        assert sorted(row[t] for t in asked) == sorted(memory)
        assert all(answers[t] == memory[row[t]] for t in asked)
        assert all(row[t] == 0 for t in range(2 * pairs, length) if t not in asked)


def test_keys_values_and_places_are_uniform():
    tokens, targets = associative_recall(20_000, 12, 3, 4, 5, generator())
    assert torch.allclose(
        tokens[:, 0].bincount(minlength=5)[1:] / 20_000, torch.tensor(0.25), atol=0.02
    )
    values = tokens[:, 1].bincount(minlength=10)[5:] / 20_000
    assert torch.allclose(values, torch.tensor(0.2), atol=0.02)
    places = (targets != IGNORE).float().mean(0)
    assert torch.allclose(places[6:], torch.tensor(0.5), atol=0.02)


@pytest.mark.parametrize(("length", "pairs"), [(23, 8), (30, 10), (30, 0)])
def test_recall_that_does_not_fit_raises(length, pairs):
    with pytest.raises(ValueError, match=f"{pairs} pairs need at least {3 * pairs} tokens"):
        associative_recall(2, length, pairs, 9, 7, generator())


def test_chain_and_recall_share_a_sequence():
    """The fillers of a row, in order, are the chain; the rest is recall as before."""
    odds = second_order_chain(4, 0.5, generator())
    tokens, targets, loss = recall_in_chain(40, 30, 5, 9, 7, odds, generator(1))
    plain, answers = associative_recall(40, 30, 5, 9, 7, generator(1))
    symbol = tokens < 4
    assert torch.equal(symbol[:, 10:], plain[:, 10:] == 0)
    assert torch.equal(tokens[~symbol] - 3, plain[~symbol])
    asked = answers != IGNORE
    assert torch.equal(targets[asked] - 3, answers[asked])
    assert (targets[:, :10] == IGNORE).all()
    for row in range(40):
        words = tokens[row][symbol[row]].tolist()
        after = targets[row][symbol[row]].tolist()
        assert words[1:] == after[:-1]
        for i in range(1, len(words)):
            odd = odds[words[i - 1], words[i], after[i]]
            assert loss[row][symbol[row]][i].item() == pytest.approx(-odd.log().item(), abs=1e-5)
    assert not loss[~symbol].any()


def test_chain_has_its_transition_probabilities():
    odds = second_order_chain(3, 0.7, generator())
    tokens, targets, _ = recall_in_chain(3000, 40, 1, 2, 2, odds, generator(1))
    counts = torch.zeros(3, 3, 3)
    for row, after in zip(tokens.tolist(), targets.tolist(), strict=True):
        words = [(w, a) for w, a in zip(row, after, strict=True) if w < 3]
        for (a, _), (b, c) in itertools.pairwise(words):
            counts[a, b, c] += 1
    found = counts / counts.sum(-1, keepdim=True)
    assert torch.allclose(found, odds, atol=0.02)


def test_the_copy_is_what_came_before_the_mark():
    tokens, targets = copying(30, 7, 5, generator())
    assert (tokens[:, 7] == 5).all()
    assert (tokens[:, :7] < 5).all()
    assert torch.equal(targets[:, 7:], tokens[:, :7])
    assert torch.equal(tokens[:, 8:], targets[:, 7:-1])
    assert (targets[:, :7] == IGNORE).all()


@pytest.mark.parametrize(("name", "order", "commutes"), [("parity", 2, True), ("s3", 6, False)])
def test_tables_are_groups(name, order, commutes):
    table = group_table(name)
    elements = range(order)
    assert table.shape == (order, order)
    assert table[0].tolist() == table[:, 0].tolist() == list(elements)  # 0 is the identity
    for row in (*table, *table.T):
        assert sorted(row.tolist()) == list(elements)
    for a, b, c in itertools.product(elements, repeat=3):
        assert table[table[a, b], c] == table[a, table[b, c]]
    assert torch.equal(table, table.T) == commutes


def test_products_are_those_of_all_elements_so_far():
    tokens, products = group_words(10, 20, "parity", generator())
    assert torch.equal(products, tokens.cumsum(1) % 2)
    tokens, products = group_words(10, 20, "s3", generator())
    table = group_table("s3")
    for t in range(20):
        for row in range(10):
            word = 0
            for element in tokens[row, : t + 1].tolist():
                word = int(table[word, element])
            assert products[row, t] == word


def test_unknown_group_raises():
    with pytest.raises(ValueError, match="parity and s3; got 's5'"):
        group_table("s5")
