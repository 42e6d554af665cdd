"""A tiny chapter that can be trained as a job, with its data."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from conftest import chapter_fields
from gatebook.training.jobs import Job

WORDS = 38
SETTINGS = {
    "task": "stream",
    "corpus": "slimpajama",
    "tokenizer": "none",
    "end_of_text": "</s>",
    "model": "gla_340m",
    "size": {"vocab_size": WORDS + 1, "d_model": 16, "n_layers": 1, "n_heads": 1, "gate_rank": 4},
    "arms": {"vector": {}, "none": {"gate": "none"}},
    "length": 16,
    "batch": 12,
    "recipe": {"steps": 40, "lr": 0.001, "accumulate": 2},
    "checkpoint_every": 10,
}


def write_rows(folder: Path, rows: list[str]) -> None:
    """Put rows and a tokeniser that knows the words w0 to w37 into a mirror."""
    (folder / "slimpajama").mkdir(parents=True)
    pq.write_table(pa.table({"text": rows}), folder / "slimpajama/train.parquet")
    vocab = {"</s>": 0} | {f"w{i}": i + 1 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "slimpajama/tokenizer.json"))


def rows() -> list[str]:
    """Words that count up by a step of their own; each of the 24 shards has 8 rows."""
    return [" ".join(f"w{(i + (i % 5 + 1) * k) % WORDS}" for k in range(30)) for i in range(24 * 8)]


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `chapters/toy.yml` and the data of its scale full."""
    folder = tmp_path_factory.mktemp("book")
    plan = {"description": "a toy", "dataset": "slimpajama", "device": "cpu", "seeds": 1}
    scales = {"small": plan | {"settings": {}}, "medium": plan | {"settings": {}}}
    (folder / "chapters").mkdir()
    fields = chapter_fields(scales=scales | {"full": plan | {"settings": SETTINGS}})
    (folder / "chapters/toy.yml").write_text(yaml.safe_dump(fields))
    write_rows(folder / "data", rows())
    return folder


@pytest.fixture
def spoilt(tmp_path: Path) -> str:
    """Data where a word that the tokeniser does not know is in a shard of an odd number."""
    texts = rows()
    texts[24 + 1] = "unheard-of"
    write_rows(tmp_path / "spoilt", texts)
    return str(tmp_path / "spoilt")


@pytest.fixture
def job(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run of the toy in a folder of its own, entered."""
    monkeypatch.chdir(book)
    run = {"folder": str(tmp_path / "run"), "data_dir": str(book / "data"), "log_every": 1}
    return Job(chapter="toy", arm="vector", device="cpu", **run)


@pytest.fixture(scope="session")
def alone(book: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in one process without a break."""
    from gatebook.training.launch import launch

    folder = str(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(book)
        job = Job(chapter="toy", arm="vector", device="cpu", folder=folder, data_dir="data")
        return launch(job).loss
