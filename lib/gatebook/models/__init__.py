"""Every model of the book, by name: `create("swin_t")`, `list_models("swin*")`.

A model file holds `MODELS`, a table from a name to a class and its configuration. The table is
all that a new model needs to be found here. `save` and `load` keep a model on disk: a folder of
`model.safetensors` and `config.json`.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatebook.errors import unknown

WEIGHTS, CONFIG = "model.safetensors", "config.json"


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


def _entry(name: str) -> tuple[type[nn.Module], Any]:
    if name not in _registry():
        raise ValueError(unknown("model", name, _registry()))
    return _registry()[name]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_registry(), pattern))


def config(name: str, **overrides: Any) -> Any:
    """The configuration of a named model, with some fields replaced.

    Raises:
        ValueError: for an unknown model or field; the message lists what is allowed.
    """
    return _replace(_entry(name)[1], overrides)


def _replace(base: Any, changes: Mapping[str, Any]) -> Any:
    _check_fields(type(base), changes)
    return dataclasses.replace(base, **changes)


def _check_fields(kind: type, names: Mapping[str, Any]) -> None:
    allowed = {field.name for field in dataclasses.fields(kind)}
    for name in names:
        if name not in allowed:
            raise ValueError(unknown(f"field of {kind.__name__}", name, allowed))


def create(name: str, *, weights: str | Path | None = None, **overrides: Any) -> nn.Module:
    """A named model; `overrides` replace fields of its configuration.

    Build it under `with torch.device("meta"):` to count parameters without allocating them.

    Args:
        name: One of `list_models()`.
        weights: Folder that `save` wrote. The model has the folder's weights, in their types, and
            its configuration, of which `overrides` can change what leaves the parameters' names
            and shapes as they are. None gives fresh weights and the configuration of the name.

    Raises:
        ValueError: for an unknown model or field, with what is allowed; for a folder that is
            damaged, holds another model, or does not fit the overrides.
        FileNotFoundError: the folder or one of its two files is missing.
    """
    kind, settings = _entry(name)
    if weights is None:
        return kind(_replace(settings, overrides))
    stored, settings = _read_config(Path(weights) / CONFIG)
    if name != stored:
        raise ValueError(f"{weights} holds {stored!r}, not {name!r}")
    model = kind(_replace(settings, overrides))
    _read_weights(Path(weights) / WEIGHTS, model)
    return model


def load(path: str | Path) -> nn.Module:
    """The model that `save` wrote to a folder, by the name in it; in training mode, as any new one.

    Raises:
        ValueError: the folder is damaged, or its model unknown to this version.
        FileNotFoundError: the folder or one of its two files is missing.
    """
    return create(_read_config(Path(path) / CONFIG)[0], weights=path)


def save(model: nn.Module, path: str | Path, *, name: str) -> None:
    """Write a model to a folder: its weights, name, whole configuration, and our version.

    Both files are written under other names, then put in place one after the other: if writing
    fails, older files stay as they were. A tensor with several names is stored once.

    Args:
        model: Not wrapped: its class is that of the name.
        path: The folder; made if it is missing.
        name: The model's, in `list_models()`; its configuration can have other values.

    Raises:
        ValueError: the name is unknown, or the model is not of its class.
        OSError: the folder could not be written; or safetensors' own error for the weights.
    """
    from safetensors.torch import save_file

    from gatebook import __version__

    kind = _entry(name)[0]
    if type(model) is not kind:
        raise ValueError(f"{name!r} is a {kind.__name__}; got a {type(model).__name__}")
    about = {"name": name, "version": __version__, "config": dataclasses.asdict(model.config)}
    state = {key: tensor.detach().contiguous() for key, tensor in _tensors(model).items()}
    Path(path).mkdir(parents=True, exist_ok=True)
    with _replacing(Path(path) / CONFIG) as text, _replacing(Path(path) / WEIGHTS) as blob:
        text.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file(state, blob)
        shutil.copymode(text, blob)  # safetensors lets nobody else read


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A path to write to, in the folder of `file`; at the end it takes the place of `file`."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; one that has several names is under the first."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _read_config(file: Path) -> tuple[str, Any]:
    """The name and configuration in a `config.json`."""
    from pydantic import TypeAdapter, ValidationError

    _check_exists(file)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    types = {"name": str, "version": str, "config": dict}
    if not isinstance(about, dict) or {key: type(about[key]) for key in about} != types:
        raise ValueError(f"{file}: expected an object of a name, a version and a config")
    name, fields = about["name"], about["config"]
    try:
        kind = type(_entry(name)[1])
        _check_fields(kind, fields)
        if missing := {field.name for field in dataclasses.fields(kind)} - fields.keys():
            raise ValueError(f"config lacks {', '.join(sorted(missing))}; add what was meant")
        return name, TypeAdapter(kind).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("config", *first["loc"])))
        raise ValueError(f"{file}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{file}, of version {about['version']}: {error}") from None


def _read_weights(file: Path, model: nn.Module) -> None:
    """Give a model the tensors of a file, in their own types."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_exists(file)
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    own = _tensors(model)
    check_shapes(own, state, str(file))
    for name, tensor in own.items():
        tensor.data = state[name].to(tensor.device, copy=True)  # a file may change under a mapping


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a saved model is a {CONFIG} and a {WEIGHTS}")


def check_shapes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Compare the names and shapes of a model's tensors with those found.

    Raises:
        ValueError: some differ; the message starts with `where` and shows the first four.
    """
    wrong = []
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        need, have = (list(x[name].shape) if name in x else None for x in (wanted, found))
        if have is None:
            wrong.append(f"{name} {need} is missing")
        elif need is None:
            wrong.append(f"{name} {have} is not the model's")
        elif have != need:
            wrong.append(f"{name} is {have}, the model's {need}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{where} does not fit: {'; '.join(wrong[:4])}{more}")
