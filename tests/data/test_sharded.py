"""Rows are dealt to processes once an epoch, in an order that no restart changes."""

from collections import Counter
from itertools import chain, islice

import pytest
import torch

from gatebook.data.sharded import Deal, ShardedBatches


def batches(processes: int = 1, rank: int = 0, *, rows: int = 50, size: int = 6, **options):
    deal = Deal(rows, size, 3, rank=rank, processes=processes)
    return ShardedBatches(torch.arange(rows), deal, **options)


def given(data: ShardedBatches, count: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(iter(data), count)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_row_comes_once_an_epoch_with_a_restart_in_the_middle(processes, parts, workers):
    seen = []
    steps = 25  # of 12 rows: six epochs of 50
    for rank in range(processes):
        first = batches(processes, rank, size=12, parts=parts, workers=workers)
        rows = given(first, 11 * parts)
        state = first.state_dict()
        again = batches(processes, rank, size=12, parts=parts, workers=workers)
        again.load_state_dict(state)
        seen += rows + given(again, (steps - 11) * parts)
    counts = Counter(row for batch in seen for row in batch)
    assert counts == {row: 6 for row in range(50)}


def test_an_epoch_ends_before_the_next_begins():
    rows = [row for batch in given(batches(), 25) for row in batch]
    for epoch in range(3):
        assert sorted(rows[50 * epoch : 50 * epoch + 50]) == list(range(50))
    assert rows[:50] != rows[50:100]


def test_a_global_batch_is_the_same_on_any_number_of_processes():
    whole = given(batches(), 20)
    for processes in (2, 3, 6):
        parts = [given(batches(processes, rank), 20) for rank in range(processes)]
        joined = [list(chain(*(part[step] for part in parts))) for step in range(20)]
        assert joined == whole


def test_the_number_of_processes_may_change_at_a_restart():
    whole, one = given(batches(), 12), batches()
    assert given(one, 5) == whole[:5]
    states = [one.state_dict()]
    for processes, steps in ((2, 3), (1, 4)):
        parts = []
        for rank in range(processes):
            data = batches(processes, rank, parts=1)
            data.load_state_dict(ShardedBatches.merge_states(states))
            parts.append((given(data, steps), data.state_dict()))
        states = [state for _, state in parts]
        first = 5 if processes == 2 else 8
        joined = [list(chain(*(rows[step] for rows, _ in parts))) for step in range(steps)]
        assert joined == whole[first : first + steps]


class Noisy:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.rand(())


def test_a_samples_random_numbers_are_its_own():
    def drawn(workers: int, processes: int) -> list[float]:
        parts = []
        for rank in range(processes):
            deal = Deal(8, 4, 0, rank=rank, processes=processes)
            parts.append(given(ShardedBatches(Noisy(), deal, workers=workers), 4))
        return [list(chain(*(part[step] for part in parts))) for step in range(4)]

    assert drawn(0, 1) == drawn(1, 1) == drawn(0, 2)
    flat = list(chain(*drawn(0, 1)))
    assert len(set(flat)) == 16  # another epoch, other numbers


def test_reading_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    stream = iter(ShardedBatches(Noisy(), Deal(8, 4, 0)))
    first = torch.rand(())
    next(stream)
    assert torch.equal(torch.stack([first, torch.rand(())]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "processes": 2}, "do not share a batch of 5 evenly"),
        ({"batch_size": 4, "processes": 2, "rank": 2}, "no rank 2"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_dealt_is_refused(options, message):
    size = options.pop("batch_size")
    with pytest.raises(ValueError, match=message):
        Deal(10, size, 0, **options)
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        batches(parts=3, processes=3)


def test_repeated_rows_come_together_and_with_other_random_numbers():
    """Of 8 rows, 3 times each, an epoch of 8 samples holds two and two thirds."""
    keys = [key for step in range(4) for key in Deal(8, 4, 0, repeats=3)(step)]
    rows = [row for _, row in keys]
    for epoch in (rows[:8], rows[8:]):
        assert len(set(epoch[0:3])) == len(set(epoch[3:6])) == len(set(epoch[6:8])) == 1
        assert len(set(epoch)) == 3
    assert len(set(keys)) == len(keys)  # the random numbers follow from the key
    assert rows[:8] != rows[8:]
    parts = [Deal(8, 4, 0, rank=r, processes=2, repeats=3)(1) for r in range(2)]
    assert parts[0] + parts[1] == keys[4:8]
