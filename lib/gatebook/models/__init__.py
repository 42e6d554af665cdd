"""Every model of the book, by name: `create("swin_t")`, `list_models("swin*")`.

A model file holds `MODELS`, a table from a name to a class and its configuration. The table is
all that a new model needs to be found here.
"""

import dataclasses
import fnmatch
import functools
import importlib
import pkgutil
from typing import Any

from torch import nn

from gatebook.errors import unknown


@functools.cache
def _registry() -> dict[str, tuple[type[nn.Module], Any]]:
    table: dict[str, tuple[type[nn.Module], Any]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, entry in module.MODELS.items():
            if name in table:
                raise ValueError(f"two model files define {name!r}; the second is {info.name}.py")
            table[name] = entry
    return table


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_registry(), pattern))


def config(name: str, **overrides: Any) -> Any:
    """The configuration of a named model, with some fields replaced.

    Raises:
        ValueError: for an unknown model or field; the message lists what is allowed.
    """
    if name not in _registry():
        raise ValueError(unknown("model", name, _registry()))
    base = _registry()[name][1]
    fields = {field.name for field in dataclasses.fields(base)}
    for key in overrides:
        if key not in fields:
            raise ValueError(unknown(f"field of {type(base).__name__}", key, fields))
    return dataclasses.replace(base, **overrides)


def create(name: str, **overrides: Any) -> nn.Module:
    """A named model with fresh weights; `overrides` replace fields of its configuration.

    Build it under `with torch.device("meta"):` to count parameters without allocating them.

    Raises:
        ValueError: for an unknown model or field; the message lists what is allowed.
    """
    settings = config(name, **overrides)
    return _registry()[name][0](settings)
