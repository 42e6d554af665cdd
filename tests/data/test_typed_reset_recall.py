"""Typed-reset recall against a plain-Python reading of its own tokens."""

import pytest
import torch

from gatebook.data.synthetic import (
    IGNORE,
    N_RESET_KEYS,
    N_VALUES,
    TYPED_RESET_TOKENS,
    UNKNOWN,
    typed_reset_groups,
    typed_reset_recall,
)

LENGTH = 48


@pytest.fixture(scope="module")
def sample():
    return typed_reset_recall(400, LENGTH, torch.Generator().manual_seed(0))


def events(row):
    """The tokens of one sequence as ("reset",), ("write", key, value) or ("ask", key)."""
    for token in row.tolist():
        if token == 0:
            yield ("reset",)
        elif token <= 2 * N_RESET_KEYS * N_VALUES:
            yield ("write", *divmod(token - 1, N_VALUES))
        else:
            yield ("ask", token - 1 - 2 * N_RESET_KEYS * N_VALUES)


def test_targets_are_what_a_reader_of_the_tokens_answers(sample):
    for row, answers in zip(*sample, strict=True):
        memory = {}
        for event, target in zip(events(row), answers.tolist(), strict=True):
            expected = IGNORE
            if event[0] == "reset":
                memory = {k: v for k, v in memory.items() if k < N_RESET_KEYS}
            elif event[0] == "write":
                memory[event[1]] = event[2]
            else:
                expected = memory.get(event[1], UNKNOWN)
            assert target == expected


def test_no_key_is_written_twice_where_it_must_not(sample):
    for row in sample[0]:
        written = set()
        for event in events(row):
            if event[0] == "reset":
                written = {key for key in written if key < N_RESET_KEYS}
            elif event[0] == "write":
                assert event[1] not in written
                written.add(event[1])


def test_frequencies_are_those_of_the_design(sample):
    tokens, _ = sample
    assert (tokens == 0).double().mean() == pytest.approx(0.08, abs=0.01)
    first = tokens[:, 0]
    group_a = (first >= 1) & (first < 1 + N_RESET_KEYS * N_VALUES)
    group_b = (first >= 1 + N_RESET_KEYS * N_VALUES) & (first < 1 + 2 * N_RESET_KEYS * N_VALUES)
    assert group_a.double().mean() == pytest.approx(0.22, abs=0.06)
    assert group_b.double().mean() == pytest.approx(0.30, abs=0.06)
    assert tokens.min() >= 0
    assert tokens.max() < TYPED_RESET_TOKENS


def test_keys_and_values_are_uniform(sample):
    kinds = [e for row in sample[0] for e in events(row)]
    asked = torch.bincount(torch.tensor([e[1] for e in kinds if e[0] == "ask"])).double()
    values = torch.bincount(torch.tensor([e[2] for e in kinds if e[0] == "write"])).double()
    assert (asked / asked.mean() - 1).abs().max() < 0.15
    assert (values / values.mean() - 1).abs().max() < 0.15


def test_groups_partition_the_questions(sample):
    tokens, targets = sample
    a, b = typed_reset_groups(tokens, targets)
    assert not (a & b).any()
    assert torch.equal(a | b, targets != IGNORE)


def test_same_seed_same_data():
    first, again, other = (
        typed_reset_recall(3, 20, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
