"""SLURM as a job sees it: the job's id, its end, and how it is requeued. Commands are lists of words."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping

from launcher.config import Run
from launcher.slurm.journal import started
from trainers.rank.say import say
from trainers.storage.run_folder import holds_run

ASK_SECONDS = 30.0
ENDED = frozenset({
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
    "DEADLINE",
})  # fmt: skip


_NO_ANSWER = re.compile(r"contact slurm controller|timed out|Connection refused", re.I)


class SlurmError(Exception):
    """A SLURM command is not installed, or it failed. The message is the command's own."""


class ControllerUnreachable(SlurmError):
    """The controller does not answer now, so nothing is known about the job."""


def ask(*argv: str) -> str:
    """Run a SLURM command and return what it prints.

    Raises:
        SlurmError: the command is not installed, or it failed.
        ControllerUnreachable: the controller does not answer.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ControllerUnreachable(f"{argv[0]}: {error}") from None
    except OSError as error:
        raise SlurmError(f"{argv[0]}: {error}") from None
    if done.returncode:
        printed = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        kind = ControllerUnreachable if _NO_ANSWER.search(printed[-1]) else SlurmError
        raise kind(f"{argv[0]}: {printed[-1].removeprefix(f'{argv[0]}: ')}")
    return done.stdout.strip()


def this_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the job that this process is a task of (12_3 in an array), or None outside a job."""
    if "SLURM_STEP_ID" not in environ:  # a shell of salloc, or the batch script
        return None
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Return how often SLURM has restarted the job; 0 outside a job."""
    return int(environ.get("SLURM_RESTART_COUNT", "0")) if this_job(environ) is not None else 0


def this_start(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return an id that only the tasks of this start of the job share, made of job, step and restarts."""
    job = this_job(environ)
    return f"{job}.{environ['SLURM_STEP_ID']}.{restarts(environ)}" if job is not None else None


def this_node(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the number of this node in its step, and the number of nodes; (0, 1) outside a job."""
    if this_job(environ) is None:
        return 0, 1
    return int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_NNODES", "1"))


def facts(job: str) -> dict[str, str]:
    """Return what `scontrol show job` prints about a job: key -> value. For an array, its first task."""
    line = ask("scontrol", "show", "job", "-o", job).splitlines()[0]
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def end_time(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return when the job's time limit ends it, in seconds as time.time(), or None if there is no limit.

    SLURM sets SLURM_JOB_END_TIME from 22.05.9 on. For older versions, ask the controller.
    """
    job = this_job(environ)
    if job is None:
        return None
    if end := environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    try:
        end = ask("squeue", "-h", "-j", job, "-o", "%e")
        return time.mktime(time.strptime(end.splitlines()[0], "%Y-%m-%dT%H:%M:%S"))
    except (SlurmError, ValueError, IndexError) as error:  # "N/A": no limit
        if isinstance(error, SlurmError):
            say("note", f"the job's time limit is unknown: {error}")
        return None


def preempted(job: str) -> bool:
    """Whether a running job is being preempted. It then has its partition's GraceTime to end."""
    try:
        return facts(job).get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    except SlurmError as error:
        say("note", f"it is unknown whether the job is preempted: {error}")
        return False


def requeue(job: str) -> bool:
    """Requeue the job under its id, after its run has ended. Return False if it cannot be requeued.

    A job that was cancelled, or submitted with --no-requeue, is not requeued.
    """
    try:
        known = facts(job)
        # BatchFlag is 0 without a batch script, and 2 if the script could not be started at first.
        if known.get("Requeue") != "1" or known.get("BatchFlag", "0") == "0":
            return False
        if known.get("JobState") != "RUNNING":
            return False
        say("requeue", f"job {job} is requeued; the run resumes when the job starts again")
        ask("scontrol", "requeue", job)
    except SlurmError as error:
        say("note", f"the job cannot be requeued: {error}")
        return False
    return True


def resumed_by_slurm(run: Run, environ: Mapping[str, str] = os.environ) -> Run:
    """Return the run that a requeued job continues: it resumes, also if the command says overwrite.

    If no earlier start of the job had the run's folder, the run in it belongs to another job.
    """
    job, count = this_job(environ), restarts(environ)
    if job is None or not count or not started(run.folder, job) or not holds_run(run.folder):
        return run
    return run.changed(f"SLURM restarted the job (SLURM_RESTART_COUNT={count})", resume=True, overwrite=False)
