"""What the mixers of the book are compared on: text, recall, copying, and the state of a group.

A task knows how many tokens it has, makes batches for training, and scores a trained model. Its
`loss` on held-out data is what a learning rate is chosen by.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.data import groups, text
from gatebook.data import recall as memory
from gatebook.data.synthetic import IGNORE
from gatebook.errors import unknown

Batch = tuple[Tensor, Tensor]  # tokens and targets, [B, T] each
HELD_OUT = 1_000_003  # added to a seed for data that training never sees


class Batches:
    """As many batches as asked for, each drawn when it is needed; every pass is the same."""

    def __init__(self, draw: Callable[[torch.Generator], Batch], count: int, seed: int) -> None:
        self.draw, self.count, self.seed = draw, count, seed

    def __iter__(self) -> Iterator[Batch]:
        """Yields tokens and targets."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            yield self.draw(generator)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn.

    Attributes:
        vocab_size: Number of tokens.
        batches: Training batches for a seed and a number of steps.
        tests: Held-out batches for each condition that is scored, such as a number of pairs.
        trained: The conditions that are those of training.
        losses: Conditions whose score is the loss in nats; that of the others is the share of right
            answers.
        late: Score the last quarter of each sequence only, as for lengths beyond those of training.
        floor: Loss of the best possible model on a condition, which is taken off.
    """

    vocab_size: int
    batches: Callable[[int, int], Any]
    tests: dict[str, list[Batch]]
    trained: tuple[str, ...]
    losses: tuple[str, ...] = ()
    late: bool = False
    floor: Mapping[str, float] = field(default_factory=dict)

    def score(self, model: nn.Module, device: str, precision: str) -> dict[str, float]:
        """The score of each condition by its name; under "loss" the mean held-out loss in nats of
        the conditions of training."""
        found, losses = {}, []
        for name, batches in self.tests.items():
            loss, right = evaluate(model, batches, device, precision, late=self.late)
            losses += [loss] if name in self.trained else []
            found[name] = loss - self.floor.get(name, 0.0) if name in self.losses else right
        return found | {"loss": sum(losses) / len(losses)}


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: list[Batch], device: str, precision: str, *, late: bool = False
) -> tuple[float, float]:
    """Mean loss in nats and share of right answers over all targets that count."""
    model.eval()
    losses = right = count = 0.0
    for tokens, targets in batches:
        tokens, targets = tokens.to(device), targets.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(tokens).float()
        start = 3 * tokens.shape[1] // 4 if late else 0
        logits, targets = logits[:, start:].flatten(0, 1), targets[:, start:].flatten()
        losses += F.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += (targets != IGNORE).sum().item()
    return losses / count, right / count


def make(kind: str, *, data_dir: str = "", choosing: bool = False, **settings: Any) -> Task:
    """A task by kind.

    Args:
        kind: "text", "recall", "copying", "parity", "s3", "chain" or "mixed".
        data_dir: Folder with local copies of the texts.
        choosing: Whether the held-out data are those by which a learning rate is chosen, or those
            that are scored.
        settings: Of that kind, see the functions below.

    Raises:
        ValueError: An unknown kind.
    """
    kinds: dict[str, Callable[..., Task]] = {
        "text": language,
        "recall": recall,
        "copying": copying,
        "parity": group,
        "s3": group,
        "chain": chain,
        "mixed": mixed,
    }
    if kind not in kinds:
        raise ValueError(unknown("task", kind, kinds))
    if kinds[kind] is group:
        settings["name"] = kind
    if kinds[kind] in (language, mixed):
        settings["data_dir"] = data_dir
    return kinds[kind](choosing=choosing, **settings)


_bytes = cache(text.byte_text)  # a process trains many models on it


def language(
    *,
    corpus: str,
    length: int,
    long: int,
    batch: int,
    test_bytes: int,
    data_dir: str,
    choosing: bool,
) -> Task:
    """Bytes of a text: loss at the length of training; and the last quarter of longer windows, with
    all that comes before it and, the same bytes, at the end of windows of the training length.

    Args:
        corpus: As for `gatebook.data.text.byte_text`.
        length: Tokens of a training window.
        long: Tokens of the long test windows.
        batch: Windows in a batch.
        test_bytes: Held-out bytes that are scored.
        data_dir: Folder with a local copy.
        choosing: As for `make`: the validation split instead of the test split.
    """
    train = _bytes(corpus, "train", data_dir)
    split = "validation" if choosing else "test"
    held_out = _bytes(corpus, split, data_dir)[: test_bytes + 1].long()

    def windows(size: int) -> list[Batch]:
        count = (len(held_out) - 1) // size
        x, y = held_out[: count * size], held_out[1 : count * size + 1]
        rows = max(1, batch * length // size)
        return list(zip(x.view(-1, size).split(rows), y.view(-1, size).split(rows), strict=True))

    tests = {
        "text": windows(length),
        "text, long": [(x, _tail(y, long // 4)) for x, y in windows(long)],
        "text, short": [
            (_ends(x, long // 4, length), _tail(_ends(y, long // 4, length), length // 2))
            for x, y in windows(long)
        ],
    }
    return Task(
        vocab_size=256,
        batches=lambda seed, steps: text.Windows(train, length, batch, steps, seed),
        tests=tests,
        trained=("text",),
        losses=tuple(tests),
    )


def _tail(y: Tensor, count: int) -> Tensor:
    """Targets of which the last `count` of each row are left."""
    return y.scatter(1, torch.arange(y.shape[1] - count).expand(len(y), -1), IGNORE)


def _ends(x: Tensor, count: int, length: int) -> Tensor:
    """Windows of `length` whose last halves are the last `count` of each row, one after another."""
    rows = x[:, x.shape[1] - count - (length - length // 2) :]
    return rows.unfold(1, length, length // 2).flatten(0, 1)


def recall(
    *,
    length: int,
    pairs: list[int],
    n_keys: int,
    n_values: int,
    batch: int,
    tests: int,
    choosing: bool,
) -> Task:
    """Multi-query associative recall: trained on all numbers of pairs, scored on each.

    Args:
        length: Tokens in a sequence.
        pairs: Numbers of pairs; a training batch has one of them.
        n_keys: Different keys.
        n_values: Different values.
        batch: Sequences in a batch.
        tests: Held-out sequences for each number of pairs.
        choosing: As for `make`.
    """

    def draw(generator: torch.Generator, count: int = 0, n: int = batch) -> Batch:
        count = count or pairs[int(torch.randint(len(pairs), (1,), generator=generator))]
        return memory.associative_recall(n, length, count, n_keys, n_values, generator)

    def held_out(count: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(_held_out_seed(count, choosing))
        return [draw(generator, count, tests)]

    return Task(
        vocab_size=1 + n_keys + n_values,
        batches=lambda seed, steps: Batches(draw, steps, seed),
        tests={f"{count} pairs": held_out(count) for count in pairs},
        trained=tuple(f"{count} pairs" for count in pairs),
    )


def _held_out_seed(number: int, choosing: bool) -> int:
    return HELD_OUT + 2 * number + choosing


def copying(*, lengths: list[int], n_symbols: int, batch: int, tests: int, choosing: bool) -> Task:
    """Copying of random symbols: trained on the first length, scored on all.

    Args:
        lengths: Numbers of symbols, the first is that of training.
        n_symbols: Different symbols.
        batch: Sequences in a batch.
        tests: Held-out sequences of each length.
        choosing: As for `make`.
    """

    def draw(n: int, length: int, generator: torch.Generator) -> Batch:
        return memory.copying(n, length, n_symbols, generator)

    sizes = {"lengths": lengths, "batch": batch, "tests": tests, "choosing": choosing}
    return _by_length("copy", n_symbols + 1, draw, **sizes)


def group(*, name: str, lengths: list[int], batch: int, tests: int, choosing: bool) -> Task:
    """The word problem of a group, trained on the first length; all lengths are scored on their
    last quarter.

    Args:
        name: "parity" or "s3".
        lengths: Numbers of elements, the first is that of training.
        batch: Sequences in a batch.
        tests: Held-out sequences of each length.
        choosing: As for `make`.
    """

    def draw(n: int, length: int, generator: torch.Generator) -> Batch:
        return groups.group_words(n, length, name, generator)

    sizes = {"lengths": lengths, "batch": batch, "tests": tests, "choosing": choosing}
    return replace(_by_length(name, len(groups.group_table(name)), draw, **sizes), late=True)


def _by_length(
    name: str,
    vocab_size: int,
    draw: Callable[[int, int, torch.Generator], Batch],
    *,
    lengths: list[int],
    batch: int,
    tests: int,
    choosing: bool,
) -> Task:
    """A task that is trained on the first length and scored on all."""

    def held_out(length: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(_held_out_seed(length, choosing))
        return [draw(tests, length, generator)]

    return Task(
        vocab_size=vocab_size,
        batches=lambda seed, steps: Batches(partial(draw, batch, lengths[0]), steps, seed),
        tests={f"{name} {length}": held_out(length) for length in lengths},
        trained=(f"{name} {lengths[0]}",),
    )


def chain(
    *,
    length: int,
    pairs: int,
    n_keys: int,
    n_values: int,
    n_symbols: int,
    temperature: float,
    batch: int,
    tests: int,
    choosing: bool,
) -> Task:
    """Recall and a second-order chain in one sequence, scored apart: the share of right answers,
    and the loss of the chain above that of who knows it.

    Args:
        length: Tokens in a sequence.
        pairs: Pairs of a key and a value.
        n_keys: Different keys.
        n_values: Different values.
        n_symbols: Symbols of the chain, which is the same for all seeds.
        temperature: Of the chain.
        batch: Sequences in a batch.
        tests: Held-out sequences.
        choosing: As for `make`.
    """
    fixed = torch.Generator().manual_seed(HELD_OUT)
    odds = memory.second_order_chain(n_symbols, temperature, fixed)
    sizes = (length, pairs, n_keys, n_values, odds)
    held_out = torch.Generator().manual_seed(_held_out_seed(0, choosing))

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Without the first symbol's target: what came before that symbol is not shown."""
        x, y, best = memory.recall_in_chain(n, *sizes, generator)
        first = (x < n_symbols).int().argmax(1, keepdim=True)
        return x, y.scatter(1, first, IGNORE), best.scatter(1, first, 0.0)

    x, y, best = draw(tests, held_out)
    symbol = (y >= 0) & (y < n_symbols)
    return Task(
        vocab_size=n_symbols + n_keys + n_values,
        batches=lambda seed, steps: Batches(
            lambda generator: draw(batch, generator)[:2], steps, seed
        ),
        tests={
            "both": [(x, y)],
            "recall": [(x, y.masked_fill(symbol, IGNORE))],
            "chain": [(x, y.masked_fill(~symbol, IGNORE))],
        },
        trained=("both",),
        losses=("both", "chain"),
        floor={"chain": best[symbol].mean().item()},
    )


def mixed(
    *,
    corpus: str,
    length: int,
    pairs: list[int],
    n_keys: int,
    n_values: int,
    batch: int,
    tests: int,
    test_bytes: int,
    data_dir: str,
    choosing: bool,
) -> Task:
    """Half of each batch is text, half recall, in one vocabulary; scored apart.

    The loss is the mean over all targets, of which text has by far the most.

    Args:
        corpus, test_bytes, data_dir: As for `language`.
        length: Tokens of a window and of a recall sequence.
        pairs, n_keys, n_values, tests: As for `recall`.
        batch: Sequences in a batch, an even number.
        choosing: As for `make`.
    """
    words = language(
        corpus=corpus,
        length=length,
        long=4 * length,
        batch=batch // 2,
        test_bytes=test_bytes,
        data_dir=data_dir,
        choosing=choosing,
    )
    own = {"length": length, "pairs": pairs, "n_keys": n_keys, "n_values": n_values}
    facts = recall(batch=batch // 2, tests=tests, choosing=choosing, **own)

    def shifted(found: Batch) -> Batch:
        """Keys and values come after the 256 bytes, the filler with them."""
        x, y = found
        return x + 256, torch.where(y >= 0, y + 256, y)

    class Both:
        def __init__(self, seed: int, steps: int) -> None:
            self.parts = (words.batches(seed, steps), facts.batches(seed, steps))

        def __iter__(self) -> Iterator[Batch]:
            for text_batch, recall_batch in zip(*self.parts, strict=True):
                pair = (text_batch, shifted(recall_batch))
                yield tuple(torch.cat(side) for side in zip(*pair, strict=True))

    held_out = {"text": words.tests["text"]}
    held_out |= {name: [shifted(b) for b in found] for name, found in facts.tests.items()}
    return Task(
        vocab_size=256 + facts.vocab_size,
        batches=Both,
        tests=held_out,
        trained=tuple(held_out),
        losses=("text",),
    )
