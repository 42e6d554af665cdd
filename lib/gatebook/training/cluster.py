"""`submit`: train a job on a cluster with Slurm, through submitit.

A process is a task of Slurm's. Before the time limit, and when Slurm preempts the job, submitit's
signal comes: all processes then write a checkpoint, and the first puts the job back into the queue,
where it goes on from there. After SIGTERM (`scontrol requeue`, `scancel`) they write one too.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import submitit
import torch.distributed as dist
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from gatebook.errors import unknown
from gatebook.evidence import provenance
from gatebook.training import jobs
from gatebook.training.fit import History
from gatebook.training.jobs import Job
from gatebook.training.launch import noted

CLUSTERS = ("slurm", "local", "debug")
REQUEUE = signal.SIGUSR2  # submitit's signal for preemption and the time limit


class Training(Checkpointable):
    """What each task does; `checkpoint`, inherited, submits the same job again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> History:
        """Train, or raise SystemExit once a signal stopped the training."""
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with noted(signal.SIGTERM, REQUEUE) as arrived:
            history = jobs.train(self.job, stop=lambda: bool(arrived))
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, arrived)
            dist.destroy_process_group()
        if not history.stopped:
            return history
        if any(REQUEUE in numbers for numbers in everywhere):
            handler = signal.signal(REQUEUE, signal.SIG_IGN)
            handler(REQUEUE, None)  # submitit's: on the first process it exits
        sys.exit()  # without a result: there is none yet


def submit(
    job: Job,
    *,
    nodes: int = 1,
    gpus: int = 1,
    cluster: str = "slurm",
    minutes: int = 24 * 60,
    partition: str | None = None,
    cpus: int = 8,
    folder: str | Path = "",
) -> submitit.Job:
    """Submit a job, and do not wait for it.

    Args:
        job: What to train.
        nodes: Hosts.
        gpus: Processes on each, with a GPU each unless the job's device is the CPU.
        cluster: "slurm"; "local" starts the processes here; "debug" runs one here when its result
            is asked for.
        minutes: Time limit, after which it is queued again, up to 100 times.
        partition: Of Slurm; None is the cluster's default.
        cpus: Cores for each process.
        folder: For submitit's files and the logs of the processes; empty is `submitit/` in the
            job's folder. All hosts must see it.

    Returns:
        submitit's job: `job_id`, `paths`, and `results()`, the `History` of each process.

    Raises:
        ValueError: A job that cannot be built, a number below 1, an unknown cluster, or several
            nodes where there is one.
        RuntimeError: There is no Slurm here.
    """
    for name, value in {"nodes": nodes, "gpus": gpus, "minutes": minutes, "cpus": cpus}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if cluster not in CLUSTERS:
        raise ValueError(unknown("cluster", cluster, CLUSTERS))
    if cluster == "debug" and nodes * gpus > 1:
        raise ValueError(f'cluster="debug" runs one process, not {nodes * gpus}')
    jobs.build(job, processes=nodes * gpus)
    executor = submitit.AutoExecutor(
        folder=Path(folder or job.path(provenance.root()) / "submitit") / "%j",
        cluster=cluster,
        slurm_max_num_timeout=100,
    )
    executor.update_parameters(
        name=f"{job.chapter}-{job.arm}",
        nodes=nodes,
        tasks_per_node=gpus,
        gpus_per_node=None if job.device == "cpu" else gpus,
        cpus_per_task=cpus,
        timeout_min=minutes,
        slurm_partition=partition,
        slurm_signal_delay_s=300,  # for the rest of `log_every` steps and the checkpoint
        slurm_additional_parameters={"requeue": True},
        slurm_srun_args=[f"--cpus-per-task={cpus}"],  # srun forgets sbatch's since Slurm 22.05
    )
    return executor.submit(Training(job))


def how_to_follow(submitted: submitit.Job) -> str:
    """The commands that show what a submitted job does, and that end it after a checkpoint."""
    number, paths = submitted.job_id, submitted.paths
    log = f"tail -f {paths.stdout} {paths.stderr}"
    if isinstance(submitted, submitit.SlurmJob):
        return f"squeue -j {number}; {log}; scancel {number}"
    return f"{log}; kill {number}"
