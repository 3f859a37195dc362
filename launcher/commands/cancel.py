"""`phalanx cancel`: ends runs; what runs saves first."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from pathlib import Path

from launcher.slurm.job import ENDED, NoAnswer, NoSlurm, ask, facts
from launcher.slurm.journal import ended, jobs
from launcher.slurm.run_state import AT_WORK, find_runs
from trainers.config.errors import ConfigError
from trainers.storage.run_folder import holder

HELP = "end runs; they save first"
USAGE = "RUN|JOB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="a run's folder, or a job's id")


def run(target: str) -> int:
    """Ends a job, or all that a run has: what waits is taken from the queue, what runs saves first."""
    for one in find_runs(target):
        said = []
        for job in [one.job] if one.job else jobs(one.folder):
            try:
                said += [_cancel_job(one.folder, job)]
            except NoAnswer as error:
                raise ConfigError(f"{one.folder}: job {job}: {error}") from None
        if not any(said):
            said = ["it does not run" if one.job else _cancel_process(one.folder)]
        for line in filter(None, said):
            print(f"{one.folder}: {line}")
    return 0


def _cancel_job(folder: Path, job: str) -> str | None:
    """What was done; None where the job, or the run within it, has ended, or SLURM knows it no more."""
    try:
        state = facts(job)["JobState"]
    except NoAnswer:
        raise
    except NoSlurm:
        return None
    if state in ENDED or (ended(folder, job) and state in AT_WORK):
        return None
    try:
        if state == "RUNNING" and _has_begun(job):
            # It may be about to go back into the queue, and shall not. Its steps alone are told: the ranks
            # save, and the job ends by itself.
            ask("scontrol", "update", f"JobId={job}", "Requeue=0")
            ask("scancel", "--signal=TERM", job)
            return f"job {job} saves and ends"
        ask("scancel", job)
    except NoSlurm as error:
        raise ConfigError(f"{folder}: job {job}: {error}") from None
    return f"job {job} was {state} and is cancelled"


def _has_begun(job: str) -> bool:
    """Whether the job has a step, beside its script: else there is nobody to tell, and nothing to save."""
    return any(
        step.rpartition(".")[2].isdigit() for step in ask("squeue", "-h", "-s", "-j", job, "-o", "%i").split()
    )


def _cancel_process(folder: Path) -> str:
    """Of a run without SLURM."""
    if (held := holder(folder)) is None:
        return "it does not run"
    pid, host = held
    if host != socket.gethostname():
        return f"it runs on {host or 'a machine that has just begun'}; cancel it there"
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return "it has just ended"
    except PermissionError:
        raise ConfigError(f"{folder}: process {pid} is of another user.") from None
    return f"process {pid} saves and ends"
