"""Jobs: runs of chapters as plain data, on small mirrors with the schema of the real data."""

import json
import re
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gatebook import models
from gatebook.measure.sequence import sequence_loss
from gatebook.training import jobs, tasks
from gatebook.training.jobs import Job
from gatebook.training.metrics import logged_losses

TINY = {"vocab_size": 200, "d_model": 32, "n_layers": 2, "n_heads": 2}


@pytest.fixture
def slimpajama(tmp_path: Path) -> Path:
    import datasets
    from tokenizers import AddedToken

    from gatebook.data.text import train_bpe

    rows = [f"row {i} says {'many words ' * (i % 7)}" for i in range(400)]
    folder = tmp_path / "data" / "slimpajama"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / "train.parquet")
    tokenizer = train_bpe(rows, 150)
    tokenizer.add_special_tokens([AddedToken("</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tmp_path / "data"


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    import datasets

    folder = tmp_path / "data" / "imagenet-1k"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 40, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 10 for i in range(24)]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "train.parquet")
    return tmp_path / "data"


@pytest.fixture
def libri2mix(tmp_path: Path) -> Path:
    for n in range(5):
        for part in ("s1", "s2"):
            folder = tmp_path / "data" / "libri2mix" / "train-360" / part
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{n}-10-000{n}_{(n + 1) % 6}-20-000{n}.wav"
            with wave.open(str(folder / name), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                samples = np.random.default_rng(n).integers(-9000, 9000, 3000)
                file.writeframes(samples.astype("<i2").tobytes())
    return tmp_path / "data"


def gla(data: Path, **changes) -> Job:
    settings = {"size": TINY, "length": 32, "batch": 4}
    recipe = {"steps": 12, "lr": 3e-3, "accumulate": 2}
    settings |= changes.pop("settings", {}) | {"recipe": recipe}
    where = {"data_dir": str(data), "folder": str(data.parent / "run"), "device": "cpu"}
    options = {"log_every": 2, "checkpoint_every": 5} | where | changes
    return Job(chapter="gla", arm="vector", settings=settings, **options)


def test_a_language_model_is_trained_logged_and_written(slimpajama):
    job = gla(slimpajama)
    history = jobs.train(job)
    folder = Path(job.folder)
    assert len(history.loss) == 12
    assert history.loss[-1] < history.loss[0]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5, 7, 9, 11]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    two = [sum(history.loss[i : i + 2]) / 2 for i in range(0, 12, 2)]
    assert logged_losses(folder / "log.jsonl") == pytest.approx(two)
    model = models.load(folder / "weights")
    assert model.config == models.config("gla_340m", **TINY)
    task = jobs.build(job)
    batch = next(iter(task.batches()))
    with torch.no_grad():
        assert task.loss(model.eval(), batch).item() < history.loss[0]
    assert json.loads((folder / "result.json").read_text())["loss"] == pytest.approx(two)
    assert jobs.train(job).loss == []  # it had ended
    assert json.loads((folder / "result.json").read_text())["loss"] == pytest.approx(two)


def test_a_job_that_was_stopped_goes_on_where_it_was(slimpajama):
    whole = jobs.train(gla(slimpajama)).loss
    job = gla(slimpajama, folder=str(slimpajama.parent / "other"))
    asked = iter([False, False, True])
    part = jobs.train(job, stop=lambda: next(asked))
    assert part.stopped
    assert not (Path(job.folder) / "weights").exists()
    rest = jobs.train(job)
    assert part.loss + rest.loss == whole
    assert len(part.loss) == 6


def test_a_run_cut_short_has_a_folder_of_its_own():
    whole, short = (Job(chapter="gla", arm="vector", max_steps=n) for n in (0, 20))
    assert whole.path(Path("x")) == Path("x/runs/gla/full/vector-0")
    assert short.path(Path("x")) == Path("x/runs/gla/full/vector-0-first-20")
    fair, other = (
        replace(whole, settings={"corpus": "cifar10", "recipe": {"lr": lr}}).path(Path("x"))
        for lr in (1e-3, 3e-4)
    )
    assert re.fullmatch(r"vector-0-cifar10-[0-9a-f]{8}", fair.name)
    assert fair != other


def test_max_steps_shortens_the_run(slimpajama):
    short = jobs.build(gla(slimpajama, max_steps=3))
    assert short.recipes[0].steps == 3
    assert len(jobs.train(gla(slimpajama, max_steps=3)).loss) == 3


def test_a_language_model_is_trained_on_what_its_modules_add_to_the_loss():
    size = TINY | {"n_heads": 8, "d_ff": 24, "balance": 1000.0}
    job = Job(chapter="moh", arm="moh50", settings={"size": size, "length": 8})
    task = jobs.build(job)
    model, batch = task.model(), task.sample(2)
    added = task.loss(model, batch) - sequence_loss(model, batch)
    each = [block.mixer.router.auxiliary_loss for block in model.blocks]
    assert added.item() == pytest.approx(sum(each).item() / 2, rel=1e-3)
    assert added > 2000  # K β = 3000 where routing is even


def test_swin_trains_on_a_mirror_of_imagenet(imagenet, tmp_path):
    small = {"d_model": 8, "depths": (2, 2), "n_heads": (2, 4), "window_size": 2}
    small |= {"image_size": 32, "n_classes": 10}
    settings = {"model": small, "batch": 4, "workers": 0}
    settings["recipe"] = {"lr": 1e-3, "accumulate": 2}
    where = {"data_dir": str(imagenet), "folder": str(tmp_path / "run"), "device": "cpu"}
    job = Job(chapter="swin", arm="unshifted", settings=settings, max_steps=3, **where)
    assert len(jobs.train(job).loss) == 3
    assert models.load(tmp_path / "run" / "weights").config.shift is False


def test_mossformer_trains_in_stages(libri2mix, tmp_path):
    models_own = {"n_layers": 1, "d_model": 16, "n_filters": 16}
    settings = {"samples": 800, "batch": 2, "arms": {"joint": {}}}
    settings["stages"] = [{"steps": 2, "schedule": "constant"}, {"steps": 3, "schedule": "cosine"}]
    where = {"data_dir": str(libri2mix), "folder": str(tmp_path / "run"), "device": "cpu"}
    allowed = vars(models.config("mossformer_l"))
    size = {name: value for name, value in models_own.items() if name in allowed}
    settings["arms"] = {"joint": size}
    job = Job(chapter="mossformer", arm="joint", settings=settings, **where)
    assert len(jobs.train(job).loss) == 5
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"stage-0", "stage-1", "weights"}
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]  # the last of each stage


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "largest", "expected"),
    [
        (16, 16, 1, 0, (16, 16)),
        (16, 16, 8, 0, (16, 2)),
        (16, 16, 32, 0, (8, 1)),
        (16, 16, 8, 6, (4, 8)),
        (256, 4, 3, 0, None),
        (6, 2, 3, 0, (4, 1)),
    ],
)
def test_processes_share_the_global_batch(batch, accumulate, processes, largest, expected):
    if expected is None:
        with pytest.raises(ValueError, match="do not share a global batch of 1024 evenly"):
            tasks.divide(batch, accumulate, processes, largest)
        return
    size, parts = tasks.divide(batch, accumulate, processes, largest)
    assert (size, parts) == expected
    assert size * parts * processes == batch * accumulate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chapter": "glq"}, "chapter 'glq'"),
        ({"scale": "small"}, "its task is 'recall'"),
        ({"arm": "both"}, "arm of gla at full 'both'"),
        ({"settings": {"lenght": 3}}, "setting of gla 'lenght'"),
    ],
)
def test_what_is_no_job_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        jobs.build(Job(**{"chapter": "gla", "arm": "vector"} | changes))
