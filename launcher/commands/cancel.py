"""`phalanx cancel`: end runs. A run that is running saves first."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from pathlib import Path

from launcher.slurm.job import ENDED, ControllerUnreachable, SlurmError, ask, facts
from launcher.slurm.journal import ended, jobs
from launcher.slurm.run_state import ACTIVE_STATES, find_runs
from trainers.config.errors import ConfigError
from trainers.storage.folder_lock import lock_owner

HELP = "end runs; they save first"
USAGE = "RUN|JOB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="a run's folder, or a job's id")


def run(target: str) -> int:
    """End a job, or all jobs of a run. Remove waiting jobs from the queue; running jobs save first."""
    for found in find_runs(target):
        lines = []
        for job in [found.job] if found.job else jobs(found.folder):
            try:
                lines += [_cancel_job(found.folder, job)]
            except ControllerUnreachable as error:
                raise ConfigError(f"{found.folder}: job {job}: {error}") from None
        if not any(lines):
            lines = ["it is not running" if found.job else _cancel_process(found.folder)]
        for line in filter(None, lines):
            print(f"{found.folder}: {line}")
    return 0


def _cancel_job(folder: Path, job: str) -> str | None:
    """Cancel a job and return what was done.

    Return None if the job, or the run within it, has ended, or if SLURM no longer knows the job.
    """
    try:
        state = facts(job)["JobState"]
    except ControllerUnreachable:
        raise
    except SlurmError:
        return None
    if state in ENDED or (ended(folder, job) and state in ACTIVE_STATES):
        return None
    try:
        if state == "RUNNING" and _has_begun(job):
            # The job may be about to be requeued: prevent that. scancel signals only its steps, not the batch
            # script: the ranks save, and the job ends by itself.
            ask("scontrol", "update", f"JobId={job}", "Requeue=0")
            ask("scancel", "--signal=TERM", job)
            return f"job {job} saves and ends"
        ask("scancel", job)
    except SlurmError as error:
        raise ConfigError(f"{folder}: job {job}: {error}") from None
    return f"job {job} was {state} and is cancelled"


def _has_begun(job: str) -> bool:
    """Whether the job has a step in addition to its script. Without a step there is nothing to save."""
    return any(
        step.rpartition(".")[2].isdigit() for step in ask("squeue", "-h", "-s", "-j", job, "-o", "%i").split()
    )


def _cancel_process(folder: Path) -> str:
    """Stop a run that has no SLURM job, and return what was done."""
    if (held := lock_owner(folder)) is None:
        return "it is not running"
    pid, host = held
    if host != socket.gethostname():
        unknown = "an unknown machine (it has just started, or its .lock was removed)"
        return f"it runs on {host or unknown}; cancel it there"
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return "it has just ended"
    except PermissionError:
        raise ConfigError(f"{folder}: process {pid} belongs to another user.") from None
    return f"process {pid} saves and ends"
