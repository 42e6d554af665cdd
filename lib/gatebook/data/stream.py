"""Streams of packed token sequences, shared by any number of processes, resumed exactly.

Shapes: B sequences in a batch of one process, T tokens in a sequence. W processes ("ranks") read
S virtual shards.
"""

import atexit
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gatebook.data import sources

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROWS = 16  # rows of a shard that are tokenised together


class PackedStream:
    """Batches of packed sequences from a text data set that is read as it is needed.

    A data set is split over S shards, whatever the number of processes is. The rows of a shard,
    each followed by the end-of-text token, are one sequence of tokens, of which sample k is the
    tokens kT to kT + T: inputs and the tokens that follow them. Rank r of W reads the shards v
    with v mod W = r and takes a sample from each in turn. With W * B a multiple of S, a global
    step is therefore the same set of samples for every W, until a shard ends.

    A shard is every S-th file if the split has S files; else it is every S-th row, and each rank
    reads all rows but tokenises its own. As all shards advance alike, the text of a shard that
    holds more than another is seen less often.

    With `epochs`, a shard ends after so many passes and leaves out the fewer than T + 1 tokens
    that fill no sample; once all shards of a rank have ended, so does the rank, and leaves out the
    samples that fill no batch. Ranks may then differ in their number of batches.

    Iterating again goes on where the stream is. After its end, it starts over.
    """

    def __init__(
        self,
        name: str,
        split: str,
        tokenizer: "Tokenizer",
        *,
        end_of_text: str,
        length: int,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
        shards: int = 24,
        epochs: int | None = None,
        data_dir: str | Path = "",
    ) -> None:
        """Opens the stream and reads its first rows.

        Args:
            name: Key of `sources.DATASETS` with a column `text`.
            split: Split of that data set.
            tokenizer: A `tokenizers.Tokenizer` that neither truncates nor pads.
            end_of_text: The token put after each row, such as "</s>".
            length: Tokens in a sequence, T.
            batch_size: Sequences in a batch of this process, B.
            rank: Number of this process, r.
            processes: Number of processes, W; it divides `shards`.
            shards: Virtual shards, S; a state is of use only with the same number.
            epochs: Passes over each shard; None repeats each without end.
            data_dir: Folder with a local copy, or empty for the hub.

        Raises:
            ValueError: A number is out of range, the tokeniser has no such token, truncates or
                pads, or the split has too few rows or no column `text`.
            sources.DataUnavailableError: The data set cannot be had.
        """
        counts = {"length": length, "batch_size": batch_size, "shards": shards, "epochs": epochs}
        for key, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}, but must be at least 1")
        if processes < 1 or shards % processes:
            allowed = ", ".join(str(w) for w in range(1, shards + 1) if shards % w == 0)
            raise ValueError(f"processes is {processes}, but {shards} shards allow {allowed}")
        if not 0 <= rank < processes:
            raise ValueError(f"rank is {rank}, but must be from 0 to {processes - 1}")
        end = tokenizer.token_to_id(end_of_text)
        if end is None:
            raise ValueError(f"the tokeniser has no token {end_of_text!r}")
        if tokenizer.truncation or tokenizer.padding:
            raise ValueError("the tokeniser truncates or pads: call no_truncation and no_padding")

        rows = sources.load(name, split, data_dir, streaming=True)
        whole = rows.num_shards >= shards  # files
        try:
            head = list(islice(rows, 1 if whole else shards))
        except ValueError as error:  # datasets refuses an empty row group
            raise ValueError(f"{name} ({split}) cannot be read, or a file is empty") from error
        if len(head) < (1 if whole else shards):
            raise ValueError(f"{name} ({split}) has {len(head)} rows, too few for {shards} shards")
        if "text" not in head[0]:
            raise ValueError(f"{name} ({split}) has no column 'text', but {sorted(head[0])}")
        self.tokenizer, self.end = tokenizer, end
        self.length, self.batch_size = length, batch_size
        self.source = {"name": name, "split": split, "shards": shards, "rows": ROWS}
        self.source["files"] = rows.num_shards if whole else 0
        reader, own = _Reader(rows, ROWS * shards), slice(None)
        self.shards: dict[int, _Shard] = {}
        for v in range(rank, shards, processes):
            if whole:
                reader = _Reader(rows.shard(shards, v, contiguous=False), ROWS)
            else:
                own = slice(v, None, shards)
            self.shards[v] = _Shard(v, reader, own, self._encode, epochs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs and targets, both `[B, T]`, int64.

        Raises:
            ValueError: A row's text is not a string, or the files of a shard have no rows.
        """
        samples = self._samples()
        while len(batch := list(islice(samples, self.batch_size))) == self.batch_size:
            block = torch.stack(batch).long()  # (B, T + 1)
            yield block[:, :-1], block[:, 1:]
        for shard in self.shards.values():
            shard.rewind()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch, in each shard of this rank: numbers and few tokens."""
        shards = {v: shard.state_dict() for v, shard in self.shards.items()}
        return {"source": self.source, "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, by this rank or, merged, by any others.

        Raises:
            ValueError: The state is of another split of the data, or lacks shards of this rank.
        """
        if state["source"] != self.source:
            raise ValueError(f"the state is of {state['source']}, the stream of {self.source}")
        missing = [v for v in self.shards if v not in state["shards"]]
        if missing:
            raise ValueError(f"the state lacks the shards {missing}: merge those of all ranks")
        for v, shard in self.shards.items():
            shard.load_state_dict(state["shards"][v])

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """One state from those that all ranks gave after the same step.

        Raises:
            ValueError: The states are of different streams, or two are of the same shard.
        """
        merged: dict[str, Any] = {"source": states[0]["source"], "shards": {}}
        for state in states:
            if state["source"] != merged["source"]:
                raise ValueError(f"the states are of {merged['source']} and of {state['source']}")
            twice = sorted(merged["shards"].keys() & state["shards"].keys())
            if twice:
                raise ValueError(f"two states hold the shards {twice}: give each rank's state once")
            merged["shards"] |= state["shards"]
        return merged

    def _samples(self) -> Iterator[Tensor]:
        """Yields `[T + 1]`, int32, of the shard that has given the fewest, until all have ended."""
        living = list(self.shards.values())
        while living:
            shard = min(living, key=lambda s: s.given)
            sample = shard.take(self.length)
            if sample is None:
                living.remove(shard)
            else:
                yield sample

    def _encode(self, texts: list[str]) -> Tensor:
        """Token ids of rows, each followed by the end-of-text token, `[N]`, int32."""
        wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if wrong:
            name, split = self.source["name"], self.source["split"]
            raise ValueError(f"{name} ({split}): 'text' must hold strings, not {wrong[0]}")
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array([*e.ids, self.end], np.int32) for e in encoded]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *ids]))


class _Reader:
    """Blocks of rows of a data set, over and over, for shards that are a few blocks apart.

    A place is a pass, a block of it, and how to find that block again in the data set.
    """

    def __init__(self, rows: Any, size: int) -> None:
        """Remembers the `IterableDataset` and the rows in a block."""
        self.rows, self.size = rows.with_format("arrow"), size
        self.start = {"at": (0, 0), "rows": self.rows.state_dict()}
        self.places: dict[int, dict[str, Any]] = {}  # of each shard
        _readers.add(self)

    def seek(self, shard: int, place: dict[str, Any]) -> None:
        """Go to a place."""
        self.places[shard] = place
        self.close()

    def close(self) -> None:
        """Close the files and forget what was read."""
        self.blocks, self.kept = None, {}

    def read(self, shard: int) -> Any:
        """The next block of a shard, an Arrow column, or None at the end of a pass."""
        if self.blocks is None:
            self.blocks = self._read(min(self.places.values(), key=lambda p: p["at"]))
        while (at := self.places[shard]["at"]) not in self.kept:
            self.kept |= next(self.blocks)
        block, self.places[shard] = self.kept[at]
        first = min(place["at"] for place in self.places.values())
        self.kept = {at: kept for at, kept in self.kept.items() if at >= first}
        return block

    def _read(self, place: dict[str, Any]) -> Iterator[dict[tuple[int, int], tuple]]:
        """Yields each block, or None after the last, and the place after it."""
        while True:
            epoch, block = place["at"]
            self.rows.load_state_dict(place["rows"])
            for table in self.rows.iter(batch_size=self.size):
                place = {"at": (epoch, block + 1), "rows": self.rows.state_dict()}
                yield {(epoch, block): (table["text"], place)}
                block += 1
            if block == 0:
                raise ValueError("the files of a shard have no rows: take fewer shards")
            place = {**self.start, "at": (epoch + 1, 0)}
            yield {(epoch, block): (None, place)}


_readers: weakref.WeakSet[_Reader] = weakref.WeakSet()


@atexit.register
def _close_readers() -> None:
    """Closes half-read files: Arrow's threads, still reading, would hang or abort the process."""
    for reader in (half_read := [reader for reader in _readers if reader.blocks]):
        reader.close()
    if half_read:
        time.sleep(2)  # Arrow does not say when its threads are done


class _Shard:
    """The tokens of one virtual shard.

    `tokens` are what was left over before the last `ROWS` rows were read, and those rows. The
    state holds the place before those rows, and they are read again on resume.
    """

    def __init__(
        self, number: int, reader: _Reader, own: slice, encode: Callable, epochs: int | None
    ) -> None:
        """Remembers the reader, which rows of a block are the shard's, and how to encode them."""
        self.number, self.reader, self.own = number, reader, own
        self.encode, self.epochs = encode, epochs
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first row."""
        left = torch.empty(0, dtype=torch.int32)
        self.load_state_dict({"place": self.reader.start, "left": left, "used": 0, "given": 0})

    def state_dict(self) -> dict[str, Any]:
        """The place before the last rows read, the tokens left then, and those used since."""
        left = self.left.clone()  # a view would be saved with all of its storage
        return {"place": self.place, "left": left, "used": self.used, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.place, self.left, self.tokens = state["place"], state["left"], state["left"]
        self.used, self.given = state["used"], state["given"]
        self.reader.seek(self.number, self.place)

    def take(self, length: int) -> Tensor | None:
        """The next sample, `[length + 1]`, int32, or None at the end."""
        while len(self.tokens) < self.used + length + 1:
            place = self.reader.places[self.number]
            ids = self._next_ids()
            if ids is None:
                return None
            if self.used <= len(self.tokens):  # else the rows from `place` on are not all back yet
                self.place, self.left = place, self.tokens[self.used :]
                self.tokens, self.used = self.left, 0
            self.tokens = torch.cat([self.tokens, ids])
        self.given += 1
        self.used += length
        return self.tokens[self.used - length : self.used + 1]

    def _next_ids(self) -> Tensor | None:
        """The tokens of the next rows, `[N]`, int32, or None at the end."""
        while self.epochs is None or self.reader.places[self.number]["at"][0] < self.epochs:
            block = self.reader.read(self.number)
            if block is not None:
                return self.encode(block[self.own].to_pylist())
        return None
