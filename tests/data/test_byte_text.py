"""Byte-level text: the embedded manual, random windows, and the tokeniser of a mirror."""

import pytest
import torch

from gatebook.data import sources
from gatebook.data.text import (
    Windows,
    byte_text,
    instruction_blocks,
    load_tokenizer,
    python_manual,
    train_bpe,
)


@pytest.fixture
def mirror(tmp_path):
    """A folder with the schema of SlimPajama's mirror, and a tokeniser beside it."""
    datasets = pytest.importorskip("datasets")
    from tokenizers import AddedToken

    rows = [f"row {i} says {'many words ' * (i % 7)}" for i in range(50)]
    folder = tmp_path / "slimpajama"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / "train.parquet")
    tokenizer = train_bpe(rows, 200)
    tokenizer.add_special_tokens([AddedToken("</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tmp_path


def test_manual_is_english_prose_and_splits_without_overlap():
    assert len(python_manual()) > 300_000
    train, rest = byte_text("python_manual", "train"), byte_text("python_manual", "validation")
    assert bytes(torch.cat([train, rest]).tolist()).decode() == python_manual()
    assert len(train) == (len(train) + len(rest)) * 9 // 10


def test_byte_text_of_a_mirror(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "books").mkdir()
    table = datasets.Dataset.from_dict({"title": ["a", "b"], "text": ["één", "two"]})
    table.to_parquet(tmp_path / "books" / "train.parquet")
    assert bytes(byte_text("books", "train", tmp_path).tolist()).decode() == "één\n\ntwo"


def test_windows_are_the_text_and_its_next_tokens():
    text = torch.arange(50, dtype=torch.uint8)
    batches = Windows(text, length=8, batch_size=4, batches=5, seed=0)
    found = list(batches)
    assert len(found) == len(batches) == 5
    for x, y in found:
        assert x.shape == y.shape == (4, 8)
        torch.testing.assert_close(x[:, 1:], y[:, :-1])
        torch.testing.assert_close(y, x + 1)


def test_windows_reach_both_ends_of_the_text():
    text = torch.arange(10, dtype=torch.uint8)
    seen = torch.cat([y for _, y in Windows(text, 8, 16, 8, seed=0)])
    assert seen.min() == 1
    assert seen.max() == 9


def test_windows_depend_on_the_seed_alone():
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (
        torch.stack([x for x, _ in Windows(text, 8, 4, 5, seed)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_short_a_text_raises():
    with pytest.raises(ValueError, match="8 tokens hold no window of 8"):
        Windows(torch.zeros(8, dtype=torch.uint8), 8, 1, 1, 0)


def test_missing_tokeniser_names_the_two_ways(tmp_path, monkeypatch):
    from tokenizers import Tokenizer

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(Tokenizer, "from_pretrained", refuse)
    with pytest.raises(sources.DataUnavailableError, match=r"DATA/slimpajama/.*network"):
        load_tokenizer("slimpajama", "mistralai/Mistral-7B-v0.1", tmp_path)


ROWS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
]


def as_bytes(text):
    return list(text.encode())


def test_instructions_are_packed_and_their_responses_alone_are_targets():
    tokens, targets = instruction_blocks(ROWS, as_bytes, 330, end_of_text=0)
    text = bytes(tokens.flatten().tolist()).decode()
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3\0Below" in text
    assert "describes a task, paired with" in text
    assert "describes a task. Write" in text
    assert tokens.shape == targets.shape == (1, 330)


def test_blocks_without_a_response_are_left_out():
    tokens, targets = instruction_blocks(ROWS, as_bytes, 3, end_of_text=0)
    assert (targets != -100).any(1).all()
    known = targets[:, :2] != -100  # what follows the last token of a block is not in it
    assert torch.equal(targets[:, :2][known], tokens[:, 1:][known])
    assert bytes(targets[targets != -100].tolist()).decode().startswith("3\0H")
