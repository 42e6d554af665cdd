"""Packed streams: each token once, the same global steps on any number of processes, resume.

The rows hold words that occur once, so that a token tells where it was read.
"""

import io
import itertools
import random
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gatebook.data import stream
from gatebook.data.stream import PackedStream

S, T = 6, 5  # shards, tokens in a sequence
N = 400  # rows
LAYOUTS = ("rows", "groups", "files")


def make_rows() -> list[str]:
    """Rows of 1 to 4 words; every eleventh row is empty."""
    words = (f"w{i}" for i in itertools.count())
    return [" ".join(itertools.islice(words, (i % 4 + 1) * (i % 11 > 0))) for i in range(N)]


ROWS = make_rows()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Without this, datasets asks the hub to count each load, of a mirror too."""
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture(scope="module")
def tokenizer():
    words = sorted({word for row in ROWS for word in row.split()})
    vocab = {word: i for i, word in enumerate(["</s>", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", 1)]
    )
    return tokenizer


def write(folder, rows, files=1, group=10_000):
    """A mirror of `files` files that hold contiguous rows, `group` rows in a row group."""
    (folder / "slimpajama").mkdir(parents=True)
    for f in range(files):
        part = rows[f * len(rows) // files : (f + 1) * len(rows) // files]
        path = folder / "slimpajama" / f"train-{f:02d}.parquet"
        pq.write_table(pa.table({"text": pa.array(part)}), path, row_group_size=group)
    return folder


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    """The same rows in one row group, in 100 row groups, and in 30 files of several row groups."""
    folder = tmp_path_factory.mktemp("mirrors")
    how = {"rows": {}, "groups": {"group": 4}, "files": {"files": 30, "group": 4}}
    return {layout: write(folder / layout, ROWS, **how[layout]) for layout in LAYOUTS}


@pytest.fixture
def packed(mirrors, tokenizer):
    """Opens a stream of a layout, or of other data."""

    def make(layout="rows", processes=1, rank=0, batch_size=S, **changes):
        where = {"rank": rank, "processes": processes, "data_dir": mirrors[layout]}
        what = {"name": "slimpajama", "split": "train", "tokenizer": tokenizer, "shards": S}
        how = {"end_of_text": "</s>", "length": T, "batch_size": batch_size}
        return PackedStream(**(where | what | how | changes))

    return make


def tokens_of(layout, tokenizer) -> list[list[int]]:
    """What each shard holds, from the rows themselves."""
    shards = [[] for _ in range(S)]
    for i, row in enumerate(ROWS):
        part = next(f for f in range(30) if i < (f + 1) * N // 30) if layout == "files" else i
        ids = [tokenizer.token_to_id(word) for word in row.split()]
        shards[part % S] += [*ids, tokenizer.token_to_id("</s>")]
    return shards


def cut(tokens: list[int]) -> list[tuple[int, ...]]:
    """The samples of a shard; they share one token."""
    return [tuple(tokens[k : k + T + 1]) for k in range(0, len(tokens) - T, T)]


def samples(batch) -> list[tuple[int, ...]]:
    """The tokens of each sequence, with the last target."""
    x, y = batch
    assert torch.equal(x[:, 1:], y[:, :-1])
    return [tuple(row) for row in torch.cat([x, y[:, -1:]], 1).tolist()]


def through_file(state):
    """The state after it was saved as checkpoints are."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def global_steps(streams, steps) -> list[Counter]:
    """The samples of each step over all ranks."""
    ranks = [itertools.islice(one, steps) for one in streams]
    return [
        Counter(sample for batch in step for sample in samples(batch))
        for step in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_take_the_shards_in_turn(packed, tokenizer, layout):
    batches = list(packed(layout, batch_size=S + 1, epochs=1))
    shards = [cut(tokens) for tokens in tokens_of(layout, tokenizer)]
    turns = itertools.zip_longest(*shards)
    expected = [sample for turn in turns for sample in turn if sample is not None]
    found = [sample for batch in batches for sample in samples(batch)]
    assert batches[0][0].shape == batches[0][1].shape == (S + 1, T)
    assert batches[0][0].dtype == batches[0][1].dtype == torch.int64
    assert found == expected[: len(found)]
    assert len(expected) - len(found) < S + 1  # the last batch was not full


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_is_a_target_once_also_over_a_restart(packed, tokenizer, layout, processes):
    seen = []
    for rank in range(processes):
        one = packed(layout, processes, rank, batch_size=1, epochs=1)
        seen += itertools.islice(one, 47)
        two = packed(layout, processes, rank, batch_size=1, epochs=1)
        two.load_state_dict(through_file(one.state_dict()))
        seen += two
    targets = Counter(token for _, y in seen for token in y.flatten().tolist())
    shards = tokens_of(layout, tokenizer)
    first = Counter(tokens[0] for tokens in shards)
    left = Counter(t for tokens in shards for t in tokens[1:][(len(tokens) - 1) // T * T :])
    assert left.total() < S * T
    assert targets + first + left == Counter(t for tokens in shards for t in tokens)
    words = [n for token, n in targets.items() if token != tokenizer.token_to_id("</s>")]
    assert set(words) == {1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incomplete_batches_are_dropped_at_the_end_of_each_rank(packed, tokenizer, layout):
    shards = [cut(tokens) for tokens in tokens_of(layout, tokenizer)]
    for rank in range(2):
        found = list(packed(layout, 2, rank, batch_size=8, epochs=1))
        expected = sum(len(shards[v]) for v in range(rank, S, 2))
        assert len(found) == expected // 8
        assert len({sample for batch in found for sample in samples(batch)}) == len(found) * 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_global_steps_do_not_depend_on_the_number_of_processes(packed, tokenizer, layout):
    found = [
        global_steps([packed(layout, w, r, batch_size=12 // w) for r in range(w)], 60)
        for w in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2]
    assert 2 * sum(map(len, tokens_of(layout, tokenizer))) < 60 * 12 * T  # each shard wraps twice


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_with_another_number_of_processes_is_exact(packed, layout):
    whole = global_steps([packed(layout, batch_size=12)], 45)
    found, state = [], None
    for processes in (1, 2, 1, 3, 6):
        size = 12 // processes
        ranks = [packed(layout, processes, r, batch_size=size) for r in range(processes)]
        for one in ranks if state else []:
            one.load_state_dict(through_file(state))
        found += global_steps(ranks, 9)
        state = PackedStream.merge_states([one.state_dict() for one in ranks])
    assert found == whole


@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_after_any_batch_is_exact(packed, layout, epochs):
    one = packed(layout, 2, 1, batch_size=5, epochs=epochs)
    batches, states = [], [one.state_dict()]
    for batch in itertools.islice(one, 40):
        batches.append(samples(batch))
        states.append(through_file(one.state_dict()))
    two = packed(layout, 2, 1, batch_size=5, epochs=epochs)
    for i in [*range(0, len(batches), 3), len(batches) - 1]:
        two.load_state_dict(states[i])
        found = [samples(batch) for batch in itertools.islice(two, 3)]
        assert found[: len(batches) - i] == batches[i : i + 3]


def test_a_resumed_stream_can_be_saved_before_its_next_batch(packed):
    one = packed("rows")
    batches = [samples(batch) for batch in itertools.islice(one, 7)]
    two, three = packed("rows"), packed("rows")
    two.load_state_dict(one.state_dict())
    three.load_state_dict(through_file(two.state_dict()))
    assert samples(next(iter(three))) == samples(next(iter(one)))
    assert len(batches) == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_repeat_each_on_its_own(packed, tokenizer, layout):
    shards = tokens_of(layout, tokenizer)
    steps = 2 * max(map(len, shards)) // T + 3
    found = [samples(batch) for batch in itertools.islice(packed(layout), steps)]
    for v, tokens in enumerate(shards):
        assert [batch[v] for batch in found] == cut(tokens * 4)[:steps]


def test_epochs_are_passes_that_follow_without_a_gap(packed, tokenizer):
    found = [s for batch in packed("rows", batch_size=1, epochs=2) for s in samples(batch)]
    expected = [cut(tokens * 2) for tokens in tokens_of("rows", tokenizer)]
    assert Counter(found) == Counter(sample for shard in expected for sample in shard)


def test_iterating_goes_on_and_starts_over_after_the_end(packed):
    one = packed("files", epochs=1)
    first = [samples(batch) for batch in itertools.islice(one, 4)]
    rest = [samples(batch) for batch in one]
    assert [samples(batch) for batch in one] == first + rest


class Recorder:
    """A tokeniser that remembers what it was asked."""

    truncation = padding = None

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []
        self.token_to_id = tokenizer.token_to_id

    def encode_batch_fast(self, texts, add_special_tokens):
        self.texts += texts
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def test_a_rank_tokenises_its_own_rows_only(packed, tokenizer):
    recorder = Recorder(tokenizer)
    list(packed("rows", 3, 1, epochs=1, tokenizer=recorder))
    assert sorted(recorder.texts) == sorted(ROWS[1::S] + ROWS[4::S])


def test_a_rank_reads_its_own_files_only(packed, tmp_path):
    write(tmp_path, ROWS, files=30)
    one = packed("files", 2, 1, batch_size=1, epochs=1)
    expected = [samples(batch) for batch in one]
    one = packed("files", 2, 1, batch_size=1, epochs=1, data_dir=tmp_path)
    for path in sorted((tmp_path / "slimpajama").iterdir())[::2]:
        path.unlink()
    assert [samples(batch) for batch in one] == expected


def test_the_state_of_long_rows_is_small(packed, tmp_path):
    write(tmp_path, [" ".join(f"w{i % 100}" for i in range(500)) for _ in range(80)])
    one = packed(data_dir=tmp_path, shards=2, length=32)
    next(itertools.islice(one, 100, None))  # past the first rows of each shard
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    assert file.tell() < 4096


def test_rows_are_kept_only_while_a_shard_is_behind(packed, tmp_path):
    write(tmp_path, [f"w{i}" for i in range(12 * stream.ROWS * S)])
    one = packed(data_dir=tmp_path)
    assert all(len(one.shards[0].reader.kept) <= 1 for _ in itertools.islice(one, 100))


def test_a_process_that_leaves_a_stream_half_read_ends(tmp_path, tokenizer):
    write(tmp_path, [random.randbytes(1000).hex() for _ in range(20_000)], group=100)
    for i in range(1, 6):
        path = tmp_path / f"slimpajama/train-{i:02d}.parquet"
        path.hardlink_to(tmp_path / "slimpajama/train-00.parquet")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    code = """
from tokenizers import Tokenizer
from gatebook.data.stream import PackedStream
tokenizer = Tokenizer.from_file("tokenizer.json")
stream = iter(PackedStream("slimpajama", "train", tokenizer, end_of_text="</s>", length=1,
                           batch_size=6, shards=6, data_dir="."))
next(stream)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length is 0, but must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"shards": 0}, "shards is 0, but must be at least 1"),
        ({"epochs": 0}, "epochs is 0, but must be at least 1"),
        ({"processes": 4}, "processes is 4, but 6 shards allow 1, 2, 3, 6"),
        ({"processes": 0}, "processes is 0, but 6 shards allow 1, 2, 3, 6"),
        ({"processes": 2, "rank": 2}, "rank is 2, but must be from 0 to 1"),
        ({"end_of_text": "<eot>"}, "the tokeniser has no token '<eot>'"),
    ],
)
def test_bad_arguments_say_what_is_allowed(packed, changes, message):
    with pytest.raises(ValueError, match=message):
        packed("rows", **changes)


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_a_tokeniser_that_truncates_or_pads_is_refused(packed, tokenizer, setting):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(8) if setting == "truncation" else other.enable_padding()
    with pytest.raises(ValueError, match="call no_truncation and no_padding"):
        packed(tokenizer=other)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pa.array([], pa.string()), r"slimpajama \(train\) cannot be read, or a file is empty"),
        (pa.array(["w1", "w2"]), r"slimpajama \(train\) has 2 rows, too few for 6 shards"),
        (pa.array(range(9)), r"slimpajama \(train\): 'text' must hold strings, not int"),
        (pa.array([*"abcdef", None]), r"slimpajama \(train\): .* strings, not NoneType"),
    ],
)
def test_bad_data_raise(packed, tmp_path, rows, message):
    write(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        list(packed(data_dir=tmp_path, length=1, epochs=1))


@pytest.mark.parametrize("files", [1, S])
def test_files_without_row_groups_are_refused(packed, tmp_path, files):
    for path in (write(tmp_path, ROWS, files=files) / "slimpajama").iterdir():
        pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()
    with pytest.raises(ValueError, match=r"slimpajama \(train\) has 0 rows"):
        packed(data_dir=tmp_path)


def test_a_shard_of_files_without_rows_is_refused(packed, tmp_path):
    path = write(tmp_path, ROWS, files=S) / "slimpajama/train-03.parquet"
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()
    with pytest.raises(ValueError, match="files of a shard have no rows: take fewer shards"):
        next(iter(packed(data_dir=tmp_path)))


def test_a_data_set_without_text_is_refused(packed, tmp_path):
    (tmp_path / "cifar10").mkdir()
    pq.write_table(pa.table({"img": [1] * S, "label": [2] * S}), tmp_path / "cifar10/train.parquet")
    with pytest.raises(ValueError, match=r"cifar10 \(train\) has no column 'text', but \['img'"):
        packed(name="cifar10", data_dir=tmp_path)


def test_states_that_do_not_fit_are_refused(packed):
    zero, one = (packed("rows", 2, rank).state_dict() for rank in range(2))
    other = packed("files", 2, 1).state_dict()
    with pytest.raises(ValueError, match=r"two states hold the shards \[0, 2, 4\]"):
        PackedStream.merge_states([zero, zero])
    with pytest.raises(ValueError, match=r"the states are of .* and of .*'files': 30"):
        PackedStream.merge_states([zero, other])
    with pytest.raises(ValueError, match=r"the state is of .*'files': 30.*, the stream of"):
        packed("rows").load_state_dict(other)
    with pytest.raises(ValueError, match=r"lacks the shards \[0, 2, 4\]: merge those of all"):
        packed("rows").load_state_dict(one)
