"""Batches of a data set with numbered rows: shuffled, dealt out to processes, exactly resumable."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Deal:
    """Which rows each process takes at each step.

    The rows of epoch e are permuted by (seed, e), the epochs laid end to end, and cut into global
    batches; a process takes its part of each. So every row is seen once in an epoch, none is left
    out, and what a global batch holds does not depend on the number of processes.

    With `repeats` (repeated augmentation, Hoffer et al., 2020) a row comes that many times in a
    row, each time with other random numbers, and an epoch of as many samples holds fewer rows.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        processes: int = 1,
        repeats: int = 1,
    ) -> None:
        """Remembers how to deal.

        Args:
            rows: Rows in the data set.
            batch_size: Rows of a global batch, of all processes together.
            seed: Of the orders.
            rank: Of this process, from 0.
            processes: How many there are; they must divide `batch_size`.
            repeats: How often a row comes.

        Raises:
            ValueError: An empty data set, or a batch that the processes cannot share evenly.
        """
        if min(rows, batch_size, repeats) < 1:
            raise ValueError(
                f"rows, batch_size and repeats are at least 1; got {rows}, {batch_size}, {repeats}"
            )
        if batch_size % processes or not 0 <= rank < processes:
            raise ValueError(
                f"{processes} processes do not share a batch of {batch_size} evenly, or have no "
                f"rank {rank}"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.processes, self.repeats = rank, processes, repeats
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> list[tuple[int, int]]:
        """Number of the pass (the epoch, or one of its repeats) and row of each sample that this
        process takes at a global step, from 0."""
        part = self.batch_size // self.processes
        first = step * self.batch_size + self.rank * part
        return [self._row(i) for i in range(first, first + part)]

    def _row(self, i: int) -> tuple[int, int]:
        epoch, place = divmod(i, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=generator)
        row, repeat = divmod(place, self.repeats)
        return epoch * self.repeats + repeat, int(self._order[row])


class _Keyed(Dataset):
    """Draws random numbers for a sample from its epoch and row alone, whichever worker takes it."""

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, row = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + epoch) * 2**24 + row)
            return self.rows[row]


class _Steps(Sampler):
    """The samples of step after step, each a batch of this process."""

    def __init__(self, deal: Deal, first: int, parts: int) -> None:
        self.deal, self.first, self.parts = deal, first, parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, part = divmod(self.first, self.parts)
        while True:
            keys = self.deal(step)
            size = len(keys) // self.parts
            for i in range(part, self.parts):
                yield keys[i * size : (i + 1) * size]
            step, part = step + 1, 0


class ShardedBatches:
    """Endless batches of a data set for one of several processes; it can be resumed exactly."""

    def __init__(self, rows: Any, deal: Deal, *, parts: int = 1, workers: int = 0) -> None:
        """Opens the data set.

        Args:
            rows: Has `rows[i]` (tensors or numbers; random numbers from torch's global generator)
                and a length.
            deal: Which rows this process takes.
            parts: Batches that a global step is cut into on this process, for accumulation.
            workers: Processes that read rows ahead.

        Raises:
            ValueError: The process's part of a global batch cannot be cut into `parts`.
        """
        own = deal.batch_size // deal.processes
        if own % parts:
            raise ValueError(f"{own} samples of a step cannot be cut into {parts} equal batches")
        self.rows, self.deal, self.parts, self.workers = rows, deal, parts, workers
        self.position = 0  # batches given so far

    def __iter__(self) -> Iterator[Any]:
        """Yields collated batches of `batch_size / processes / parts` samples."""
        loader = DataLoader(
            _Keyed(self.rows, self.deal.seed),
            batch_sampler=_Steps(self.deal, self.position, self.parts),
            num_workers=self.workers,
            generator=torch.Generator(),  # leaves the global one alone
        )
        for batch in loader:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Steps given so far; a step of which only a part was given is begun again."""
        return {"step": self.position // self.parts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken, on any number of processes."""
        self.position = state["step"] * self.parts

    @staticmethod
    def merge_states(states: list[dict[str, int]]) -> dict[str, int]:
        """One state from those of all processes, which are alike."""
        return states[0]
