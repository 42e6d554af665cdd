"""Text for language models: tokenisers, blocks of token ids, and n-gram baselines."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gatebook.data import sources

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train_bpe(rows: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Trains a byte-pair tokeniser that splits on white space and punctuation first.

    Args:
        rows: Texts to learn from.
        vocab_size: Number of tokens, [UNK] included.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(rows, trainer)
    return tokenizer


def encode_rows(tokenizer: "Tokenizer", rows: Iterable[str], size: int) -> Tensor:
    """Encodes rows, joins them without a separator and cuts the result into blocks.

    Args:
        tokenizer: From `train_bpe`.
        rows: Texts.
        size: Tokens in a block; what is left after the last whole block is dropped.

    Returns:
        Token ids, [N, size], int64.
    """
    ids = [torch.tensor(e.ids) for e in tokenizer.encode_batch_fast(list(rows)) if e.ids]
    joined = torch.cat(ids) if ids else torch.empty(0, dtype=torch.long)
    return joined[: len(joined) // size * size].view(-1, size)


@dataclass(frozen=True)
class Corpus:
    """Blocks of a tokenised data set.

    Attributes:
        train: [N, size].
        validation: [M, size].
        vocab_size: Number of tokens of the tokeniser.
    """

    train: Tensor
    validation: Tensor
    vocab_size: int


def load_corpus(
    name: str,
    data_dir: str | Path = "",
    *,
    vocab_size: int = 10_000,
    size: int = 257,
    max_rows: dict[str, int] | None = None,
) -> Corpus:
    """Loads a text data set, trains the tokeniser on all its splits, and cuts it into blocks.

    Args:
        name: Key of `sources.DATASETS` with a column `text` and a validation split.
        data_dir: Folder with a local copy, or empty for the hub.
        vocab_size: Tokens to train; a small text yields fewer.
        size: Tokens in a block: 257 gives 256 inputs and as many targets.
        max_rows: Rows to keep of a split, from its start; a split without an entry is whole.

    Returns:
        The training and validation blocks.
    """
    rows = {}
    for split in sources.DATASETS[name].splits:
        table = sources.load(name, split, data_dir)
        keep = min((max_rows or {}).get(split, len(table)), len(table))
        rows[split] = list(table.select(range(keep))["text"])
    tokenizer = train_bpe((row for split in rows.values() for row in split), vocab_size)
    train, validation = (encode_rows(tokenizer, rows[s], size) for s in ("train", "validation"))
    return Corpus(train, validation, tokenizer.get_vocab_size())


class ShuffledBatches:
    """Batches of blocks, in a new order at each pass; the last incomplete one is left out."""

    def __init__(self, blocks: Tensor, batch_size: int, seed: int) -> None:
        """Remembers the blocks.

        Args:
            blocks: [N, size]; the batches stay on its device.
            batch_size: Blocks in a batch.
            seed: Of the orders.

        Raises:
            ValueError: When the blocks do not fill one batch.
        """
        if len(blocks) < batch_size:
            raise ValueError(f"{len(blocks)} blocks do not fill a batch of {batch_size}")
        self.blocks, self.batch_size = blocks, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.blocks) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yields [batch_size, size]."""
        order = torch.randperm(len(self.blocks), generator=self.generator)
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.blocks[rows.to(self.blocks.device)]


def unigram_loss(train: Tensor, blocks: Tensor, vocab_size: int) -> Tensor:
    """Add-one unigram model: loss of each target in nats, [N, size] -> [N, size - 1]."""
    return -_unigram(train, vocab_size).log()[blocks[:, 1:]].float()


def bigram_loss(train: Tensor, blocks: Tensor, vocab_size: int) -> Tensor:
    """Bigram model with Witten-Bell smoothing, which has nothing to tune.

    P(w | v) = (c(v, w) + n(v) P(w)) / (c(v) + n(v)), with n(v) the number of different tokens that
    follow v and P the add-one unigram model.

    Args:
        train: Blocks that are counted, [M, size].
        blocks: Blocks that are scored, [N, size].
        vocab_size: Number of tokens.

    Returns:
        Loss of each target in nats, [N, size - 1].
    """
    seen, counts = (train[:, :-1] * vocab_size + train[:, 1:]).unique(return_counts=True)
    first = seen // vocab_size
    followers = torch.bincount(first, minlength=vocab_size)  # n(v)
    total = torch.bincount(train[:, :-1].flatten(), minlength=vocab_size)  # c(v)
    pairs = (blocks[:, :-1] * vocab_size + blocks[:, 1:]).contiguous()
    at = torch.searchsorted(seen, pairs).clamp(max=len(seen) - 1)
    count = torch.where(seen[at] == pairs, counts[at], 0).double()
    v, w = blocks[:, :-1], blocks[:, 1:]
    unigram = _unigram(train, vocab_size)[w]
    n = followers[v].clamp(min=1)  # a context that was never seen falls back to the unigram
    return -((count + n * unigram) / (total[v] + n)).log().float()


def _unigram(train: Tensor, vocab_size: int) -> Tensor:
    """Add-one probabilities of the targets, [vocab_size], float64."""
    counts = torch.bincount(train[:, 1:].flatten(), minlength=vocab_size).double() + 1
    return counts / counts.sum()


MANUAL = "python_manual"  # the name by which `byte_text` knows `python_manual`


def python_manual() -> str:
    """Python's own reference manual, 0.46 MB of English that every Python installation carries.

    The text differs a little between Python versions; the order of the topics is alphabetical.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def byte_text(name: str, split: str, data_dir: str | Path = "") -> Tensor:
    """A whole text as UTF-8 bytes, its rows joined by an empty line.

    Args:
        name: Key of `sources.DATASETS` with a column `text`, or "python_manual".
        split: Split of that data set; of the manual, "train" is the first nine tenths and any
            other name the rest.
        data_dir: Folder with a local copy, or empty for the hub; not used for the manual.

    Returns:
        Byte values `[N]`, uint8.
    """
    if name == MANUAL:
        data = python_manual().encode()
        cut = len(data) * 9 // 10
        data = data[:cut] if split == "train" else data[cut:]
    else:
        data = "\n\n".join(sources.load(name, split, data_dir)["text"]).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Windows:
    """Random windows of one long sequence of tokens, as inputs and the tokens that follow them."""

    def __init__(self, tokens: Tensor, length: int, batch_size: int, batches: int, seed: int):
        """Remembers the text; every pass over it gives the same batches.

        Args:
            tokens: `[N]`, any integer type; the batches stay on its device.
            length: Tokens in a window, T.
            batch_size: Windows in a batch, B.
            batches: Batches in a pass.
            seed: Of the windows' places.

        Raises:
            ValueError: The text is shorter than one window and the token after it.
        """
        if len(tokens) <= length:
            raise ValueError(f"{len(tokens)} tokens hold no window of {length} and its next token")
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.batches, self.seed = batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs and targets, both `[B, T]`, int64."""
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.arange(self.length + 1, device=self.tokens.device)
        places = len(self.tokens) - self.length
        for _ in range(self.batches):
            start = torch.randint(places, (self.batch_size, 1), generator=generator)
            window = self.tokens[start.to(offsets.device) + offsets].long()  # (B, T + 1)
            yield window[:, :-1], window[:, 1:]


def mask_tokens(
    tokens: Tensor, vocab_size: int, generator: torch.Generator, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """BERT's task (Devlin et al. 2019): some tokens are hidden and have to be found.

    Args:
        tokens: `[B, T]`, int64.
        vocab_size: Number of tokens; the mask is the one after them.
        generator: On the CPU.
        rate: Share of tokens that are asked. Of these 80 % become the mask, 10 % a random token,
            and 10 % stay.

    Returns:
        Inputs, and targets that are −100 where nothing is asked, both `[B, T]`.
    """
    draw, kind = torch.rand(2, *tokens.shape, generator=generator).to(tokens.device)
    other = torch.randint(vocab_size, tokens.shape, generator=generator).to(tokens.device)
    asked = draw < rate
    inputs = torch.where(asked & (kind < 0.8), vocab_size, tokens)
    inputs = torch.where(asked & (kind >= 0.9), other, inputs)
    return inputs, torch.where(asked, tokens, -100)


def load_tokenizer(name: str, hub_id: str, data_dir: str | Path = "") -> "Tokenizer":
    """The tokeniser of a data set: `data_dir/NAME/tokenizer.json` if it is there, else the hub's.

    Args:
        name: Folder of the data set below `data_dir`.
        hub_id: Repository on the Hugging Face hub that holds a `tokenizer.json`.
        data_dir: Folder with a local copy, or empty.

    Raises:
        sources.DataUnavailableError: Neither can be had.
    """
    from tokenizers import Tokenizer

    local = Path(data_dir).expanduser() / name / "tokenizer.json"
    if data_dir and local.is_file():
        return Tokenizer.from_file(str(local))
    try:
        return Tokenizer.from_pretrained(hub_id)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise sources.DataUnavailableError(
            f"no tokeniser ({type(error).__name__}): put tokenizer.json of {hub_id} into "
            f"DATA/{name}/ and run with `-p data_dir DATA`, or run on a machine with a network."
        ) from error


ALPACA = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def instruction_blocks(
    rows: Iterable[Mapping[str, str]],
    encode: Callable[[str], list[int]],
    length: int,
    end_of_text: int,
) -> tuple[Tensor, Tensor]:
    """Instructions and responses in the Alpaca format, packed; the responses alone are targets.

    Args:
        rows: With `instruction`, `input` (empty where there is none) and `output`.
        encode: Text to token ids, without special tokens.
        length: Tokens in a block, T; what fills no block is dropped, and so is a block without a
            target.
        end_of_text: Id of the token after each response, a target as well.

    Returns:
        Token ids and the targets that follow them, both [N, T]; targets in a prompt are -100.
    """
    ids: list[int] = []
    targets: list[int] = []
    for row in rows:
        more = bool(row["input"])
        prompt = ALPACA.format(
            context=", paired with an input that provides further context" if more else "",
            instruction=row["instruction"],
            input=f"### Input:\n{row['input']}\n\n" if more else "",
        )
        asked, answer = encode(prompt), [*encode(row["output"]), end_of_text]
        ids += asked + answer
        targets += [-100] * len(asked) + answer
    blocks = max(0, len(ids) - 1) // length
    tokens, wanted = torch.tensor(ids), torch.tensor(targets)
    tokens = tokens[: blocks * length].view(-1, length)
    wanted = wanted[1 : blocks * length + 1].view(-1, length)
    answered = (wanted != -100).any(1)  # a block inside one long prompt has nothing to learn from
    return tokens[answered], wanted[answered]
