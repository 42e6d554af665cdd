"""Jobs on one process and on several: losses, signals, failures, files."""

import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner

from conftest import logged, wait_for
from gatebook.cli import main
from gatebook.training import Recipe
from gatebook.training import launch as module
from gatebook.training.jobs import Job
from gatebook.training.launch import launch, read_job, write_job

STEPS = 40


def at(step: int, action: Callable[[], Any], seen: list[int] | None = None) -> Callable[..., Any]:
    """A progress bar that does something at a step."""

    def progress(items: range, _words: Callable[[], str]) -> Iterator[int]:
        for item in items:
            if seen is not None:
                seen.append(item)
            if item == step:
                action()
            yield item

    return progress


def send(*numbers: int) -> Callable[[], None]:
    """Sends signals to this process."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def workers(process: psutil.Process) -> list[psutil.Process]:
    """The processes that torch's launcher started."""
    return [p for p in process.children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_that_is_stopped_and_goes_on_is_bit_equal(job, alone, number):
    usual = signal.getsignal(number)
    first = launch(job, progress=at(13, send(number)))
    assert signal.getsignal(number) is usual
    assert first.stopped
    assert len(first.loss) == 14
    second = launch(job)
    assert not second.stopped
    assert first.loss + second.loss == alone
    result = json.loads((Path(job.folder) / "result.json").read_text())
    assert result["loss"] == pytest.approx(alone)


def test_a_second_signal_ends_one_process_at_once(job):
    with pytest.raises(KeyboardInterrupt):
        launch(job, progress=at(5, send(signal.SIGINT, signal.SIGINT)))


def test_two_processes_that_are_stopped_and_go_on_equal_one(job, alone, capfd):
    seen: list[int] = []
    first = launch(job, gpus=2, progress=at(3, send(signal.SIGTERM), seen))
    assert seen[:4] == [0, 1, 2, 3]
    assert first.stopped
    assert 3 < len(first.loss) < STEPS
    seen.clear()
    second = launch(job, gpus=2, progress=at(-1, list, seen))
    assert seen == list(range(len(first.loss), STEPS))
    assert not second.stopped
    assert first.loss + second.loss == pytest.approx(alone, rel=1e-6)
    assert capfd.readouterr() == ("", "")
    assert len(list(Path(job.folder).glob(f"stage-0/step-{STEPS:08d}/rank-*.pt"))) == 2
    assert Path(job.folder, "weights/model.safetensors").is_file()


def test_signals_wait_until_a_process_has_its_handlers(job, tmp_path, monkeypatch):
    def masked(*_: Any) -> list[str]:
        code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return [done.stdout]

    monkeypatch.setattr(module, "elastic_launch", lambda *_: masked)
    found = launch(job, gpus=2)
    assert "SIGTERM" in found
    assert "SIGINT" in found


def command(job: Job) -> list[str]:
    """The command that trains a job on two processes."""
    words = ["--arm", job.arm, "--device", "cpu", "--gpus", "2", "--data-dir", job.data_dir]
    return [sys.executable, "-m", "gatebook.cli", "train", "toy", *words, "--folder", job.folder]


def test_what_a_process_fails_of_is_said_in_one_line_that_names_its_log(job, spoilt):
    job = replace(job, data_dir=spoilt)
    done = subprocess.run(command(job), capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    message, _, log = line.partition(" (log: ")
    wrong = "Exception: WordLevel error: Missing [UNK] token from the vocabulary"
    assert message == f"Error: process 1 failed: {wrong}"
    text = Path(log.removesuffix(")")).read_text()
    assert "Traceback" in text
    assert wrong in text


def test_a_killed_process_is_named(tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    report = tmp_path / "run/attempt_0/0/error.json"
    report.parent.mkdir(parents=True)
    report.write_text('{"message": {"message": "RuntimeError: connection closed"}}')
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=-9, error_file="")
    message = str(module._first_failure(tmp_path, ChildFailedError("work", {1: failure})))
    assert "process 1 failed: Signal 9 (SIGKILL)" in message


def test_a_bar_goes_on_in_the_stage_that_was_reached(tmp_path):
    task = SimpleNamespace(recipes=[Recipe(steps=steps, lr=1.0) for steps in (12, 8, 5)])
    (tmp_path / "stage-0/step-00000012").mkdir(parents=True)
    assert module._steps_done(task, tmp_path) == 12
    for name in ("stage-1/step-00000004", "stage-1/step-00000006", "stage-1/step-00000008.partial"):
        (tmp_path / name).mkdir(parents=True)
    assert module._steps_done(task, tmp_path) == 18


def test_an_error_here_leaves_no_process_behind(job, monkeypatch):
    def sleep(*_: Any) -> None:
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        process.start()
        Path(job.folder, "log.jsonl").write_text('{"step": 0}\n')
        process.join()

    monkeypatch.setattr(module, "elastic_launch", lambda *_: sleep)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(job, gpus=2, progress=at(0, send(signal.SIGINT, signal.SIGINT)))
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()


def test_processes_outlive_a_killed_parent_by_a_checkpoint(job, alone):
    parent = psutil.Popen(command(job), stdout=subprocess.DEVNULL)
    wait_for(lambda: logged(job.folder))
    orphans = workers(parent)
    parent.kill()
    parent.wait()
    assert len(orphans) == 2
    assert not psutil.wait_procs(orphans, timeout=30)[1]
    (checkpoint,) = sorted(Path(job.folder).glob("stage-0/step-????????"))[-1:]
    first = int(checkpoint.name.removeprefix("step-"))
    assert launch(job).loss == pytest.approx(alone[first:], rel=1e-6)


def test_under_torchrun_a_signal_ends_all_and_one_process_can_go_on(job, alone, tmp_path):
    write_job(job, tmp_path / "job.json")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "gatebook.training.launch", str(tmp_path / "job.json")]
    start = [sys.executable, "-m", *launcher, *words]
    with psutil.Popen(start, stdout=subprocess.PIPE, text=True) as run:
        wait_for(lambda: logged(job.folder))
        run.children()[1].terminate()  # one process alone
        said, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "stopped" in said
    first = len(logged(job.folder))
    assert first < STEPS
    assert launch(job).loss == pytest.approx(alone[first:], rel=1e-6)
    assert logged(job.folder) == pytest.approx(alone, rel=1e-6)


def test_numbers_of_gpus_that_cannot_be(job, monkeypatch):
    monkeypatch.setattr(module, "elastic_launch", lambda *_: pytest.fail("it started"))
    with pytest.raises(ValueError, match="gpus is 0, but must be at least 1"):
        launch(job, gpus=0)
    with pytest.raises(ValueError, match="5 processes do not share a global batch of 24"):
        launch(job, gpus=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for device in ("cuda", "auto"):
        with pytest.raises(ValueError, match="gpus is 4, but this machine has 3"):
            launch(replace(job, device=device), gpus=4)


def test_a_job_is_read_as_it_was_written(job, tmp_path):
    job = replace(job, strategy="fsdp", compile=True, seed=3)
    write_job(job, tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == job
    (tmp_path / "short.json").write_text('{"chapter": "gla", "arm": "vector"}')
    assert read_job(tmp_path / "short.json") == Job(chapter="gla", arm="vector")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        ("3", "'int' object is not iterable"),
        ('["chapter"]', "the job: "),
        ('{"chapter": "gla", "arm": "vector", "sede": 1}', "'sede'. Did you mean 'seed'?"),
        ('{"chapter": "gla", "arm": "vector", "seed": "1"}', "seed: Input should be a valid int"),
        ('{"chapter": "gla"}', "arm: Field required"),
    ],
)
def test_a_job_that_is_none_is_refused_with_its_file(tmp_path, text, problem):
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"job\.json: ") as caught:
        read_job(path)
    assert problem in str(caught.value)


def train(*words: str) -> Any:
    return CliRunner().invoke(main, ["train", *words])


def test_the_command_trains_and_says_where(job, alone):
    words = ("toy", "--arm", "vector", "--data-dir", job.data_dir, "--folder", job.folder)
    result = train(*words, "--device", "cpu", "--batch", "6")
    assert result.exit_code == 0
    assert f"go to {job.folder}" in result.output
    assert f"{STEPS} steps" in result.output
    means = [statistics.mean(alone[i : i + 10]) for i in range(0, STEPS, 10)]
    assert logged(job.folder) == pytest.approx(means, rel=1e-6)


def test_every_option_of_the_command_reaches_the_job(job, monkeypatch):
    given = {}
    monkeypatch.setattr(module, "launch", lambda job, **more: given.update(job=job, **more))
    words = "--gpus 2 --seed 3 --steps 7 --batch 6 --folder f --device cuda --strategy fsdp"
    monkeypatch.setenv("GATEBOOK_DATA", "mirror")
    train("toy", "--arm", "none", *words.split(), "--compile", "--recompute", "--tensorboard")
    del given["progress"]
    options = {"max_steps": 7, "batch": 6, "folder": "f", "data_dir": "mirror", "device": "cuda"}
    switches = {"strategy": "fsdp", "compile": True, "recompute": True, "tensorboard": True}
    wanted = Job(chapter="toy", arm="none", seed=3, **options, **switches)
    assert given == {"job": wanted, "gpus": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy",), "train needs --arm: none, vector"),
        (("toi", "--arm", "vector"), "unknown chapter 'toi'. Did you mean 'toy'?"),
        (("toy", "--arm", "vectr"), "unknown arm of toy at full 'vectr'. Did you mean 'vector'?"),
        (("toy", "--scale", "small"), "toy at small cannot be trained as a job"),
        (("toy", "--arm", "none", "--gpus", "5"), "5 processes do not share a global batch of 24"),
        (("toy", "--arm", "none", "--device", "cuda", "--gpus", "12"), "this machine has 0"),
        (("toy", "--arm", "none", "--data-dir", "nowhere"), "put tokenizer.json of none into"),
    ],
)
def test_the_command_says_what_is_wrong(job, monkeypatch, words, message):
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda _: 1 / 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = train(*words)
    assert result.exit_code in (1, 2)
    assert result.output.count("Error:") == 1
    assert message in " ".join(result.output.split())
