"""Data sets of the Hugging Face hub, at a pinned revision, or from a local mirror.

`load("cifar10", "train")` asks the hub. With `data_dir` (or the environment variable
GATEBOOK_DATA) it reads `data_dir/cifar10/train*.parquet` instead, which must have the same
columns. Nothing falls back to other data: what cannot be had raises `DataUnavailableError`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatebook.errors import unknown


class DataUnavailableError(RuntimeError):
    """A data set could not be had; the message names it, its size and the ways to get it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set is and what it must look like."""

    hub_id: str  # repository on the Hugging Face hub; empty where there is none
    revision: str  # commit or branch that is asked for
    columns: tuple[str, ...]  # columns that a mirror must have
    download: str  # size of the download
    config: str | None = None  # configuration of the hub data set
    splits: tuple[str, ...] = ("train", "test")
    note: str = ""  # licence or access condition


DATASETS: dict[str, Source] = {
    "cifar10": Source(
        hub_id="uoft-cs/cifar10",
        revision="0b2714987fa478483af9968de7c934580d0bb9a2",
        columns=("img", "label"),
        download="144 MB",
    ),
    "imagenet-1k": Source(
        hub_id="ILSVRC/imagenet-1k",
        revision="main",
        columns=("image", "label"),
        download="155 GB",
        splits=("train", "validation"),
        note="gated: accept the terms on the hub and run `huggingface-cli login`",
    ),
    "free_spoken_digit": Source(
        hub_id="",
        revision="",
        columns=("digit", "speaker", "index", "audio"),
        download="17 MB",
        note="convert the recordings of github.com/Jakobovski/free-spoken-digit-dataset to Parquet",
    ),
    "books": Source(
        hub_id="",
        revision="",
        columns=("title", "text"),
        download="10 MB",
        splits=("train", "validation", "test"),
        note="any collection of public-domain books, one row a book",
    ),
    "tiny_shakespeare": Source(
        hub_id="karpathy/tiny_shakespeare",
        revision="refs/convert/parquet",
        columns=("text",),
        download="1.1 MB",
        splits=("train", "validation", "test"),
    ),
    "wikitext-2": Source(
        hub_id="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        columns=("text",),
        download="4.7 MB",
        splits=("train", "validation", "test"),
    ),
    "wikitext-103": Source(
        hub_id="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        columns=("text",),
        download="313 MB",
        splits=("train", "validation", "test"),
    ),
    "tinystories": Source(
        hub_id="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        columns=("text",),
        download="1 GB",
        splits=("train", "validation"),
    ),
    "wikipedia": Source(
        hub_id="wikimedia/wikipedia",
        config="20231101.en",
        revision="b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        columns=("text",),
        download="12 GB",
        splits=("train",),
    ),
    "fineweb-edu": Source(
        hub_id="HuggingFaceFW/fineweb-edu",
        config="sample-100BT",
        revision="main",
        columns=("text",),
        download="277 GB",
        splits=("train",),
    ),
    "alpaca-cleaned": Source(
        hub_id="yahma/alpaca-cleaned",
        revision="main",
        columns=("instruction", "input", "output"),
        download="44 MB",
        splits=("train",),
        note="CC BY 4.0; the first 200 rows serve as validation set",
    ),
    "slimpajama": Source(
        hub_id="cerebras/SlimPajama-627B",
        revision="2d0accdd58c5d5511943ca1f5ff0e3eb5e293543",
        columns=("text",),
        download="895 GB",
        splits=("train", "validation", "test"),
    ),
}


def load(name: str, split: str, data_dir: str | Path = "", streaming: bool = False) -> Any:
    """One split of a data set, as `datasets.Dataset` (or `IterableDataset` when streaming).

    Args:
        name: a key of `DATASETS`.
        split: one of that source's splits.
        data_dir: folder that holds `NAME/SPLIT*.parquet`; empty takes the environment variable
            GATEBOOK_DATA, and without that the hub.
        streaming: read row by row instead of downloading everything first.

    Raises:
        ValueError: unknown name or split, or a mirror with other columns.
        DataUnavailableError: the mirror has no such file, or the hub cannot be reached.
    """
    if name not in DATASETS:
        raise ValueError(unknown("data set", name, DATASETS))
    source = DATASETS[name]
    if split not in source.splits:
        raise ValueError(unknown(f"split of {name}", split, source.splits))
    folder = str(data_dir or os.environ.get("GATEBOOK_DATA", ""))
    dataset = (
        _from_mirror(name, split, Path(folder).expanduser(), streaming)
        if folder
        else _from_hub(name, split, streaming)
    )
    found = list(dataset.column_names or next(iter(dataset)))
    missing = [column for column in source.columns if column not in found]
    if missing:
        where = f"{Path(folder).name}/{name}" if folder else source.hub_id
        raise ValueError(
            f"{where} ({split}) has the columns {found}, but {name} needs {list(source.columns)}; "
            f"missing: {missing}."
        )
    return dataset


def how_to_get(name: str) -> str:
    """How a user gets a data set: its size, the hub id or its origin, and the local mirror."""
    source = DATASETS[name]
    config = f", name={source.config!r}" if source.config else ""
    hub = (
        f'on a machine with a network, `datasets.load_dataset("{source.hub_id}"{config}, '
        f'revision="{source.revision}")`'
        if source.hub_id
        else "it has no hub id; " + source.note
    )
    note = f" ({source.note})" if source.note and source.hub_id else ""
    files = ", ".join(f"{split}.parquet" for split in source.splits)
    return (
        f"{name}: {source.download}. Two ways to get it: (1) {hub}{note}; (2) put {files} with the "
        f"columns {list(source.columns)} into DATA/{name}/ and run with `-p data_dir DATA` "
        f"(or set GATEBOOK_DATA)."
    )


def _from_mirror(name: str, split: str, folder: Path, streaming: bool) -> Any:
    files = sorted(str(path) for path in (folder / name).glob(f"{split}*.parquet"))
    if not files:
        raise DataUnavailableError(f"data_dir has no {name}/{split}*.parquet. {how_to_get(name)}")
    datasets = _datasets()
    return datasets.load_dataset(
        "parquet", data_files={split: files}, split=split, streaming=streaming
    )


def _from_hub(name: str, split: str, streaming: bool) -> Any:
    source = DATASETS[name]
    if not source.hub_id:
        raise DataUnavailableError(f"{name} is not on the hub. {how_to_get(name)}")
    datasets = _datasets()
    try:
        return datasets.load_dataset(
            source.hub_id,
            source.config,
            split=split,
            revision=source.revision,
            streaming=streaming,
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataUnavailableError(
            f"the hub gave no {name} ({type(error).__name__}). {how_to_get(name)}"
        ) from error


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets
