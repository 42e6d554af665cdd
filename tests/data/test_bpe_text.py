import math
from collections import Counter

import pytest
import torch

from gatebook.data import sources, text

ROWS = ["the cat sat on the mat", "", "the dog sat on the log", "a cat and a dog"] * 40


@pytest.fixture
def mirror(tmp_path):
    """A folder with the schema of the hub's WikiText-2 and TinyStories."""
    datasets = pytest.importorskip("datasets")
    for name in ("wikitext-2", "tinystories"):
        for split in sources.DATASETS[name].splits:
            (tmp_path / name).mkdir(exist_ok=True)
            table = datasets.Dataset.from_dict({"text": ROWS})
            table.to_parquet(str(tmp_path / name / f"{split}.parquet"))
    return tmp_path


def test_blocks_hold_the_rows_joined_without_a_separator():
    tokenizer = text.train_bpe(ROWS, 60)
    blocks = text.encode_rows(tokenizer, ROWS, 7)
    joined = [i for row in ROWS for i in tokenizer.encode(row).ids]
    assert blocks.shape == (len(joined) // 7, 7)
    assert blocks.flatten().tolist() == joined[: len(joined) // 7 * 7]


def test_tokeniser_splits_on_white_space_and_has_the_asked_size():
    tokenizer = text.train_bpe(ROWS, 20)
    assert tokenizer.get_vocab_size() == 20
    assert tokenizer.encode("the cat").ids == [
        *tokenizer.encode("the").ids,
        *tokenizer.encode("cat").ids,
    ]
    assert tokenizer.decode(tokenizer.encode("Ω").ids, skip_special_tokens=False) == "[UNK]"


@pytest.mark.parametrize("name", ["wikitext-2", "tinystories"])
def test_corpus_is_read_from_the_hubs_schema(mirror, name):
    corpus = text.load_corpus(name, mirror, vocab_size=20, size=9)
    assert corpus.train.shape[1] == corpus.validation.shape[1] == 9
    assert corpus.vocab_size == 20
    assert corpus.train.max() < 20


def test_max_rows_keeps_the_first_rows(mirror):
    whole = text.load_corpus("tinystories", mirror, vocab_size=20, size=9)
    limits = {"train": 80, "validation": 40}
    part = text.load_corpus("tinystories", mirror, vocab_size=20, size=9, max_rows=limits)
    assert len(part.train) == pytest.approx(len(whole.train) / 2, abs=1)
    assert len(part.validation) == pytest.approx(len(whole.validation) / 4, abs=1)


def test_each_pass_holds_every_whole_batch_once_in_a_new_order():
    blocks = torch.arange(11)[:, None].expand(11, 3)
    batches = text.ShuffledBatches(blocks, 4, seed=0)
    first, second = ([batch[:, 0].tolist() for batch in batches] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4]
    assert len({i for batch in first for i in batch}) == 8
    assert first != second
    again = text.ShuffledBatches(blocks, 4, seed=0)
    assert [batch[:, 0].tolist() for batch in again] == first


def test_too_few_blocks_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="3 blocks do not fill a batch of 4"):
        text.ShuffledBatches(torch.zeros(3, 5), 4, seed=0)


def test_unigram_loss_is_the_add_one_estimate():
    train, blocks = torch.tensor([[9, 0, 0, 1]]), torch.tensor([[5, 0, 1, 2]])
    expected = [-math.log(3 / 13), -math.log(2 / 13), -math.log(1 / 13)]
    assert text.unigram_loss(train, blocks, 10)[0].tolist() == pytest.approx(expected)


def test_bigram_loss_is_the_witten_bell_estimate():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(6, (20, 8), generator=generator)
    blocks = torch.randint(7, (5, 8), generator=generator)  # token 6 is never seen in training
    pairs = Counter(map(tuple, train.unfold(1, 2, 1).flatten(0, 1).tolist()))
    loss = text.bigram_loss(train, blocks, 7)
    unigram = text.unigram_loss(train, blocks, 7)
    for row in range(5):
        for t in range(7):
            v, w = blocks[row, t].item(), blocks[row, t + 1].item()
            total = sum(n for (a, _), n in pairs.items() if a == v)
            kinds = len({b for a, b in pairs if a == v}) or 1
            back = math.exp(-unigram[row, t].item())
            expected = -math.log((pairs[v, w] + kinds * back) / (total + kinds))
            assert loss[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_bigram_probabilities_sum_to_one():
    train = torch.randint(5, (9, 6), generator=torch.Generator().manual_seed(0))
    blocks = torch.stack([torch.full((5,), 3), torch.arange(5)], dim=1)  # 3 -> every token
    assert text.bigram_loss(train, blocks, 5).neg().exp().sum().item() == pytest.approx(1.0)
