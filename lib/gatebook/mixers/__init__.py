"""Every token mixer of the book, in one backbone and at one budget of parameters.

A file holds its mixers in a table `MIXERS`, from a name to a function of `Sizes` that makes one
module for each block. `mixers` names the book's files; `read` takes one of yours.

A mixer obeys the contract of `gatebook.layers.language`, `mixer(x, state=None) -> (y, state)`. One
that returns None for its state can be trained and compared, but not timed as a decoder.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gatebook import measure
from gatebook.errors import unknown
from gatebook.layers.language import Convolved, Decoder, llama_width


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a mixer may know of the model that it becomes a part of."""

    d_model: int  # D
    n_heads: int  # H, for mixers that have no reason to want another number
    n_layers: int  # blocks
    conv_width: int = 0  # taps of a causal convolution before every mixer; 0 leaves it out


Make = Callable[[Sizes], list[nn.Module]]


@functools.cache
def mixers() -> dict[str, Make]:
    """All mixers of the book, by name, in the order of its tables."""
    # each file is named here, so that evidence is known to depend on it
    from gatebook.mixers import gam, lstm, mamba2, softmax
    from gatebook.models import gated_attention, hybrid_linear, moh, sqa

    table: dict[str, Make] = {}
    for module in (softmax, gated_attention, sqa, moh, hybrid_linear, mamba2, gam, lstm):
        _add(table, module.MIXERS, module.__name__)
    return table


def hybrids() -> dict[str, Make]:
    """Linear mixers with softmax attention in some blocks, by names such as "gla 3:1"."""
    from gatebook.models import hybrid_linear

    return hybrid_linear.HYBRIDS


def read(path: str | Path) -> dict[str, Make]:
    """The book's mixers, its hybrids, and the mixers of a file.

    Args:
        path: A Python file with a table `MIXERS`; empty for none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has no table `MIXERS`, or a name that is taken.
    """
    table = mixers() | hybrids()
    if not str(path):
        return table
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"gatebook_mixers_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    if not getattr(module, "MIXERS", None):
        raise ValueError(
            f'{path.name} needs a table such as MIXERS = {{"mine": lambda sizes: [Mine(...) for _ '
            "in range(sizes.n_layers)]}"
        )
    _add(table, module.MIXERS, path.name)
    return table


def _add(table: dict[str, Make], more: dict[str, Make], where: str) -> None:
    for name, make in more.items():
        if name in table:
            raise ValueError(f"two files define the mixer {name!r}; the second is {where}")
        table[name] = make


TOLERANCE = 0.02  # of the budget


def budget(vocab_size: int, sizes: Sizes) -> int:
    """Parameters of every model of a comparison: those of the usual Transformer of these sizes,
    four maps of D × D for attention and LLaMA's feed-forward width."""
    d, f = sizes.d_model, llama_width(sizes.d_model)
    return 2 * vocab_size * d + d + sizes.n_layers * (4 * d * d + 3 * d * f + 2 * d)


def build(make: Make, vocab_size: int, sizes: Sizes) -> Decoder:
    """A language model with a mixer, its feed-forward width fitted to the budget.

    Args:
        make: Makes the mixers, one for each block.
        vocab_size: Number of tokens.
        sizes: Of the model.

    Raises:
        ValueError: The mixers leave no room for a feed-forward network of 8 hidden channels, or
            there are not as many as blocks.
    """
    made = make(sizes)
    if len(made) != sizes.n_layers:
        raise ValueError(f"{sizes.n_layers} blocks need as many mixers; got {len(made)}")
    if sizes.conv_width:
        made = [Convolved(mixer, sizes.d_model, sizes.conv_width) for mixer in made]
    aim, channel = budget(vocab_size, sizes), 3 * sizes.d_model * sizes.n_layers
    rest = 2 * vocab_size * sizes.d_model + sizes.d_model * (1 + 2 * sizes.n_layers)
    width = 8 * round((aim - rest - measure.parameters(nn.ModuleList(made))) / (8 * channel))
    if width < 8:
        raise ValueError(
            f"the mixers' {measure.parameters(nn.ModuleList(made)):,} parameters leave no room "
            f"in a budget of {aim:,}"
        )
    model = Decoder(
        vocab_size=vocab_size,
        d_model=sizes.d_model,
        mixers=made,
        d_ff=width,
        init_std=sizes.d_model**-0.5,
    )
    excess = measure.parameters(model) / aim - 1
    if abs(excess) > TOLERANCE:
        raise ValueError(f"the model has {excess:+.1%} parameters, {TOLERANCE:.0%} is allowed")
    return model


def choose(names: list[str], table: dict[str, Make]) -> dict[str, Make]:
    """Some mixers by name.

    Raises:
        ValueError: A name that is not in the table; the message lists near ones.
    """
    for name in names:
        if name not in table:
            raise ValueError(unknown("mixer", name, table))
    return {name: table[name] for name in names}
