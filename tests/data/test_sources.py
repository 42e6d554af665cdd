"""Loaders read a local mirror with the hub's schema and never fall back to other data."""

from pathlib import Path

import pytest
from datasets import Dataset

from gatebook.data import sources


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = {"title": ["A", "B"], "text": ["one", f"two {split}"]}
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return tmp_path


def test_a_mirror_is_read(mirror: Path) -> None:
    assert sources.load("books", "validation", mirror)["text"][1] == "two validation"


def test_a_mirror_can_be_streamed(mirror: Path) -> None:
    rows = list(sources.load("books", "train", mirror, streaming=True))
    assert [row["title"] for row in rows] == ["A", "B"]


def test_the_environment_variable_names_the_mirror(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEBOOK_DATA", str(mirror))
    assert len(sources.load("books", "train")) == 2


def test_a_missing_split_says_how_to_get_it(mirror: Path) -> None:
    with pytest.raises(sources.DataUnavailableError, match=r"no books/test\*\.parquet.*10 MB"):
        sources.load("books", "test", mirror)


def test_a_wrong_schema_names_the_columns(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    Dataset.from_dict({"content": ["x"]}).to_parquet(tmp_path / "books/train.parquet")
    with pytest.raises(ValueError, match=r"needs \['title', 'text'\]; missing"):
        sources.load("books", "train", tmp_path)


def test_unknown_names_are_errors(mirror: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'books'"):
        sources.load("boks", "train", mirror)
    with pytest.raises(ValueError, match="unknown split of books 'dev'"):
        sources.load("books", "dev", mirror)


def test_data_that_is_on_no_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEBOOK_DATA", raising=False)
    with pytest.raises(sources.DataUnavailableError, match="not on the hub"):
        sources.load("books", "train")


def test_every_source_says_how_to_get_it() -> None:
    for name, source in sources.DATASETS.items():
        text = sources.how_to_get(name)
        assert source.download in text
        assert source.hub_id or source.note
