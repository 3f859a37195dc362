"""`phalanx status | logs | cancel`: a run seen from any node that sees its folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.slurm.job import ENDED, NoAnswer, NoSlurm, ask, facts
from launcher.slurm.journal import JOBS, ended, jobs, last_job
from trainers.config.errors import ConfigError
from trainers.storage.manifest import CHECKPOINT_PREFIX
from trainers.storage.run_folder import LAUNCH, PROGRESS, RECORD, holder, holds_run

FOLLOW_SECONDS = 0.5
AT_WORK = ("RUNNING", "COMPLETING")
UNKNOWN = "UNKNOWN"  # the state of a job while SLURM does not answer
STATE_SECONDS = 10.0  # between two questions whether the run goes on: the controller has many users


@dataclass(frozen=True)
class Status:
    """What is known of a run; None where it is not."""

    run: str
    state: str  # SLURM's word for the job, or running, ended, stopped
    job: str | None = None
    reason: str | None = None  # why the job waits, or did not end well
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: int | None = None
    attempts: int = 0
    requeues: int = 0

    @property
    def line(self) -> str:
        parts = [self.run, self.state + (f" ({self.reason})" if self.reason else "")]
        if self.job:
            parts.append(f"job {self.job}")
        if self.step is not None:
            parts.append(f"step {self.step}/{self.max_steps}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        if self.seconds_left is not None and self.state in ("RUNNING", "running"):
            hours, rest = divmod(self.seconds_left, 3600)
            parts.append(f"ETA {hours}:{rest // 60:02d}:{rest % 60:02d}")
        if self.attempts > 1:
            parts.append(f"{self.attempts} attempts")
        if self.requeues:
            parts.append(f"requeued {self.requeues} times")
        return "  ".join(parts)


def status(folder: Path, job: str | None = None) -> Status:
    """Reads the run's folder, and asks SLURM for a job: its last one, if none is named."""
    progress = _progress(folder)
    job = job or last_job(folder)
    state, reason, requeues = _state(folder, job)
    attempts = len([path for path in (folder / LAUNCH).glob("attempt-*") if path.is_dir()])
    return Status(str(folder), state, job, reason, attempts=attempts, requeues=requeues, **progress)


def _progress(folder: Path) -> dict[str, Any]:
    path = folder / PROGRESS
    if not path.exists():
        return {}
    told = json.loads(path.read_text(encoding="utf-8"))
    names = ("step", "max_steps", "loss", "tokens_per_second", "seconds_left")
    return {name: told.get(name) for name in names}


def _state(folder: Path, job: str | None) -> tuple[str, str | None, int]:
    """The state, why, and how often the job was requeued."""
    if job is not None:
        try:
            known = facts(job)
            reason, state = known.get("Reason", "None"), known["JobState"]
            # A job may make several runs, one after the other.
            if not (ended(folder, job) and state in AT_WORK):
                return state, None if reason == "None" else reason, int(known.get("Restarts", "0"))
        except NoAnswer as error:
            return UNKNOWN, str(error), 0
        except NoSlurm:
            pass  # the job is forgotten, or this machine has no SLURM
    if holder(folder) is not None:
        return "running", None, 0
    return ("ended" if (folder / RECORD).exists() and _has_model(folder) else "stopped"), None, 0


def _has_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Target:
    """A run that a command is meant for; with a job where the user named one."""

    folder: Path
    job: str | None = None


def find(name: str | None) -> list[Target]:
    """The runs that are meant: of a folder, of a job's id, or all below this folder.

    Raises:
        ConfigError: there is none.
    """
    if name is not None and Path(name).is_dir() and _is_run(Path(name)):
        return [Target(Path(name))]
    below = sorted(_below(Path()))
    if name is None:
        return [Target(folder) for folder in below]
    if found := [Target(folder, job) for folder in below for job in jobs(folder) if _same_job(name, job)]:
        return found
    raise ConfigError(
        f"{name}: no run lies there, and no run below {Path.cwd()} has such a job. Give a run's folder or a "
        "job's id."
    )


def _below(root: Path) -> Iterator[Path]:
    """The runs in a folder; they may be at work, so what is gone meanwhile is passed over."""
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


def show_status(name: str | None, as_json: bool) -> int:
    found = [status(target.folder, target.job) for target in find(name)]
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    if not found:
        print(f"no runs below {Path.cwd()}")
    for one in found:
        print(one.line)
    return 0


# ------------------------------------------------------------------------------------------------- logs


def show_logs(name: str, rank: int, follow: bool) -> int:
    """Prints the log of a rank in the newest attempt; `follow`: and what comes, until the run ends."""
    folder = _one(name)
    seen: Path | None = None
    try:
        for path in _logs(folder, rank, follow):
            if path != seen:
                print(f"--- {path}", file=sys.stderr)
            seen = path
    except KeyboardInterrupt:  # the way to end it; the run goes on
        return 128 + signal.SIGINT
    if seen is None:
        raise ConfigError(f"{folder}: there is no log of rank {rank} yet.")
    return 0


def _logs(folder: Path, rank: int, follow: bool) -> Iterator[Path]:
    """Copies to the terminal what is new in the newest log, and gives its path; ends with the run."""
    path, position, over, asked = None, 0, False, float("-inf")
    while True:
        if time.monotonic() - asked >= STATE_SECONDS:
            over, asked = not follow or not _goes_on(folder), time.monotonic()
        newest = _newest_log(folder, rank)
        if newest != path:
            path, position = newest, 0
        if path is not None:
            with path.open("rb") as file:
                file.seek(position)
                chunk = file.read()
            yield path
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            position += len(chunk)
        if over:
            return
        time.sleep(FOLLOW_SECONDS)


def _newest_log(folder: Path, rank: int) -> Path | None:
    found = [
        path
        for pattern in ("attempt-*", "attempt-*/machine-*")
        for path in (folder / LAUNCH).glob(f"{pattern}/rank-{rank}.log")
    ]
    return max(found, key=lambda path: _attempt_of(folder, path), default=None)


def _attempt_of(folder: Path, log: Path) -> int:
    return int(log.relative_to(folder / LAUNCH).parts[0].removeprefix("attempt-"))


def _goes_on(folder: Path) -> bool:
    state, _, _ = _state(folder, last_job(folder))
    return state not in (*ENDED, "ended", "stopped")


def _one(name: str) -> Path:
    found = {target.folder for target in find(name)}
    if len(found) > 1:
        runs = ", ".join(sorted(str(folder) for folder in found))
        raise ConfigError(f"{name}: several runs are meant: {runs}. Give one of them.")
    return found.pop()


# ----------------------------------------------------------------------------------------------- cancel


def cancel(name: str) -> int:
    """Ends a job, or all that a run has: what waits is taken from the queue, what runs saves first."""
    for target in find(name):
        said = []
        for job in [target.job] if target.job else jobs(target.folder):
            try:
                said += [_cancel_job(target.folder, job)]
            except NoAnswer as error:
                raise ConfigError(f"{target.folder}: job {job}: {error}") from None
        if not any(said):
            said = ["it does not run" if target.job else _cancel_process(target.folder)]
        for line in filter(None, said):
            print(f"{target.folder}: {line}")
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
