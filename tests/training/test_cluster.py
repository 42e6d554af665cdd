"""Jobs through submitit: what Slurm is asked for, signals, the queue."""

import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import submitit
from click.testing import CliRunner

from conftest import logged, wait_for
from gatebook.cli import main
from gatebook.training.cluster import how_to_follow, submit


def call(*words: str) -> Any:
    return CliRunner().invoke(main, ["submit", *words])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that stand in for Slurm's: sbatch counts the jobs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "srun": "",
        "sbatch": f"echo x >> {folder}/jobs; echo Submitted batch job $(wc -l < {folder}/jobs)",
    }
    for name, line in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_every_arm_becomes_a_job_that_asks_for_what_was_said(copy, slurm):
    words = ("--scale", "full", "--nodes", "2", "--gpus", "8", "--partition", "long")
    result = call("gla", *words, "--hours", "36")
    assert result.exit_code == 0, result.output
    arms = ("none", "fixed", "scalar", "vector", "transformer")
    for number, arm in enumerate(arms, 1):
        folder = copy / f"runs/gla/full/{arm}-0/submitit/{number}"
        assert f"gla {arm}: job {number}\n" in result.output
        assert f"squeue -j {number}; tail -f {folder}/{number}_0_log.out" in result.output
        script = (folder / f"{number}_submission.sh").read_text()
        asked = dict(
            line.removeprefix("#SBATCH --").partition("=")[::2]
            for line in script.splitlines()
            if line.startswith("#SBATCH")
        )
        assert asked == {
            "job-name": f"gla-{arm}",
            "nodes": "2",
            "ntasks-per-node": "8",
            "gpus-per-node": "8",
            "cpus-per-task": "8",
            "time": "2160",
            "partition": "long",
            "signal": "USR2@300",
            "requeue": "",
            "open-mode": "append",
            "output": f"{folder.parent}/%j/%j_0_log.out",
            "error": f"{folder.parent}/%j/%j_0_log.err",
            "wckey": "submitit",
        }
        (command,) = (line for line in script.splitlines() if line.startswith("srun"))
        assert "--cpus-per-task=8" in command
        assert "submitit.core._submit" in command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toi",), "unknown chapter 'toi'. Did you mean 'toy'?"),
        (("toy", "--arm", "vectr"), "unknown arm of toy at full 'vectr'"),
        (("toy", "--nodes", "2", "--gpus", "8"), "16 processes do not share a global batch of 24"),
        (("toy", "--local"), "--local and --folder need --arm"),
        (("toy", "--folder", "x"), "--local and --folder need --arm"),
        (("toy", "--local", "--arm", "none", "--nodes", "2"), "can use only one node"),
        (("toy", "--arm", "none"), 'Could not detect "srun"'),
    ],
)
def test_the_command_says_what_is_wrong(job, monkeypatch, words, message):
    monkeypatch.setenv("PATH", "")
    result = call(*words)
    assert result.exit_code in (1, 2)
    assert result.output.count("Error:") == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes is 0, but must be at least 1"),
        ({"minutes": 0}, "minutes is 0, but must be at least 1"),
        ({"cluster": "slrum"}, "unknown cluster 'slrum'. Did you mean 'slurm'?"),
        ({"cluster": "debug", "gpus": 2}, "runs one process, not 2"),
    ],
)
def test_numbers_and_clusters_that_cannot_be(job, options, message):
    with pytest.raises(ValueError, match=message):
        submit(job, **options)


@pytest.mark.filterwarnings("ignore")  # submitit's, about its own log
def test_debug_trains_here_when_the_result_is_asked_for(job, alone):
    usual = signal.getsignal(signal.SIGTERM)
    submitted = submit(job, cluster="debug")
    assert logged(job.folder) == []
    assert submitted.result().loss == alone
    assert signal.getsignal(signal.SIGTERM) is usual


def test_two_processes_that_are_preempted_go_on_by_themselves(job, alone):
    submitted = submit(job, gpus=2, cluster="local", cpus=1)
    wait_for(lambda: len(logged(job.folder)) > 2)
    for task in psutil.Process(int(submitted.job_id)).children():
        task.send_signal(signal.SIGUSR2)
    one, two = submitted.results()
    assert one.loss == two.loss
    assert 0 < len(one.loss) < len(alone)
    assert logged(job.folder) == pytest.approx(alone, rel=1e-6)
    assert "Requeued job" in submitted.stderr() + submitted.stdout()
    assert "tail -f" in how_to_follow(submitted)


@pytest.fixture
def real_slurm() -> None:
    """Skips where there is no Slurm that answers."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm here")


@pytest.mark.parametrize("how", ["requeued", "timed out"])
def test_a_job_of_slurm_goes_on_after_it_was_put_back(real_slurm, job, alone, how):
    job = replace(job, folder=str(Path.home() / f"gatebook-slurm-test/{os.getpid()}-{how}"))
    submitted = submit(job, gpus=2, cpus=1, minutes=15)
    assert isinstance(submitted, submitit.SlurmJob)
    try:
        wait_for(lambda: len(logged(job.folder)) > 2, 300)
        command = {
            "requeued": ["scontrol", "requeue", submitted.job_id],
            "timed out": ["scancel", "--signal=USR2", submitted.job_id],
        }
        subprocess.run(command[how], check=True)
        now = ["scontrol", "update", f"JobId={submitted.job_id}", "StartTime=now"]

        def ended() -> bool:
            subprocess.run(now, capture_output=True)  # else it waits for two minutes
            return submitted.paths.result_pickle.exists()

        wait_for(ended, 300)
        assert logged(job.folder) == pytest.approx(alone, rel=1e-6)
        assert 0 < len(submitted.results()[0].loss) < len(alone)
    finally:
        submitted.cancel()
        shutil.rmtree(Path(job.folder).parent)
