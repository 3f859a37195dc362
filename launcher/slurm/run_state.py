"""The runs that a command applies to, and the state of each run, from its folder and from SLURM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.slurm.job import ControllerUnreachable, SlurmError, facts
from launcher.slurm.journal import ended, jobs, last_job
from trainers.config.errors import ConfigError
from trainers.rank.protocol import LAUNCH, attempts
from trainers.storage.folder_lock import lock_owner
from trainers.storage.identity import RECORD
from trainers.storage.manifest import CHECKPOINT_PREFIX
from trainers.storage.run_files import JOBS
from trainers.storage.run_folder import PROGRESS, holds_run
from trainers.storage.state_files import read_object

ACTIVE_STATES = ("RUNNING", "COMPLETING")
UNKNOWN = "UNKNOWN"  # the state of a job while SLURM does not answer


@dataclass(frozen=True)
class Status:
    """What is known about a run; None for what is unknown."""

    run: str
    state: str  # SLURM's state of the job, or running, ended, stopped
    job: str | None = None
    reason: str | None = None  # why the job waits or failed
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: int | None = None
    attempts: int = 0
    requeues: int = 0


def read_status(folder: Path, job: str | None = None) -> Status:
    """Return the status of a run from its folder and from SLURM, for this job or (None) for its last one."""
    progress = _progress(folder)
    job = job or last_job(folder)
    state, reason, requeues = state_of(folder, job)
    return Status(
        str(folder), state, job, reason, attempts=len(attempts(folder)), requeues=requeues, **progress
    )


def _progress(folder: Path) -> dict[str, Any]:
    path = folder / PROGRESS
    try:
        progress = read_object(path, "A run writes it again at its next step.")
    except FileNotFoundError:
        return {}
    names = ("step", "max_steps", "loss", "tokens_per_second", "seconds_left")
    return {name: progress.get(name) for name in names}


def state_of(folder: Path, job: str | None) -> tuple[str, str | None, int]:
    """Return the state of a run, the reason for it, and how often the job was requeued."""
    if job is not None:
        try:
            known = facts(job)
            reason, state = known.get("Reason", "None"), known["JobState"]
            # A job may have several runs, one after the other.
            if not (ended(folder, job) and state in ACTIVE_STATES):
                return state, None if reason == "None" else reason, int(known.get("Restarts", "0"))
        except ControllerUnreachable as error:
            return UNKNOWN, str(error), 0
        except SlurmError:
            pass  # SLURM no longer knows the job, or this machine has no SLURM
    if lock_owner(folder) is not None:
        return "running", None, 0
    return ("ended" if (folder / RECORD).exists() and _has_model(folder) else "stopped"), None, 0


def _has_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Target:
    """A run that a command applies to, with the job if the user named one."""

    folder: Path
    job: str | None = None


def find_runs(name: str | None) -> list[Target]:
    """Return the run in a folder, the runs of a job, or (None) all runs below the working folder.

    Raises:
        ConfigError: a name was given, and there is no such run.
    """
    if name is not None and Path(name).is_dir() and _is_run(Path(name)):
        return [Target(Path(name))]
    below = sorted(_runs_below(Path()))
    if name is None:
        return [Target(folder) for folder in below]
    if found := [Target(folder, job) for folder in below for job in jobs(folder) if _same_job(name, job)]:
        return found
    raise ConfigError(
        f"{name}: it is not a run's folder, and no run below {Path.cwd()} has a job with this id. Give a "
        "run's folder or a job's id."
    )


def _runs_below(root: Path) -> Iterator[Path]:
    """Yield the runs below a folder. Folders that a running run deletes meanwhile are skipped."""
    for path, folders, _ in os.walk(root):
        if LAUNCH in folders and _is_run(Path(path)):
            yield Path(path)
        folders[:] = [
            name for name in folders if not name.startswith((".", CHECKPOINT_PREFIX)) and name != LAUNCH
        ]


def _is_run(folder: Path) -> bool:
    return holds_run(folder) or (folder / JOBS).exists()


def _same_job(name: str, job: str) -> bool:
    return name in (job, job.partition("_")[0])
