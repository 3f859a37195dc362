"""SLURM as a job sees it: which job this is, when it ends, and how it comes back. Commands are lists."""

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


_SILENT = re.compile(r"contact slurm controller|timed out|Connection refused", re.I)


class NoSlurm(Exception):
    """A command of SLURM is not there, or was refused; the message is what it said."""


class NoAnswer(NoSlurm):
    """The controller does not answer now; nothing is known of the job."""


def ask(*argv: str) -> str:
    """What a command of SLURM prints.

    Raises:
        NoSlurm: it is not installed, or refuses; NoAnswer: the controller does not answer.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{argv[0]}: {error}") from None
    except OSError as error:
        raise NoSlurm(f"{argv[0]}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with {done.returncode}"]
        kind = NoAnswer if _SILENT.search(said[-1]) else NoSlurm
        raise kind(f"{argv[0]}: {said[-1].removeprefix(f'{argv[0]}: ')}")
    return done.stdout.strip()


def this_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """The id of the job that this process is a task of, 12_3 in an array; None outside of any."""
    if "SLURM_STEP_ID" not in environ:  # a shell of salloc, or the batch script
        return None
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """How often the job was restarted."""
    return int(environ.get("SLURM_RESTART_COUNT", "0")) if this_job(environ) is not None else 0


def this_start(environ: Mapping[str, str] = os.environ) -> str | None:
    """What all tasks of this start of the job know, and no other start: the job, its step, its restarts."""
    job = this_job(environ)
    return f"{job}.{environ['SLURM_STEP_ID']}.{restarts(environ)}" if job is not None else None


def this_node(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The number of this node in its step, and how many there are."""
    if this_job(environ) is None:
        return 0, 1
    return int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_NNODES", "1"))


def facts(job: str) -> dict[str, str]:
    """What `scontrol show job` says of a job; of the first task of an array."""
    line = ask("scontrol", "show", "job", "-o", job).splitlines()[0]
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def end_time(environ: Mapping[str, str] = os.environ) -> float | None:
    """When the job's time limit comes, as time.time() gives it; None where there is none.

    SLURM sets SLURM_JOB_END_TIME from 22.05.9 on; before, the controller is asked.
    """
    job = this_job(environ)
    if job is None:
        return None
    if told := environ.get("SLURM_JOB_END_TIME"):
        return float(told)
    try:
        told = ask("squeue", "-h", "-j", job, "-o", "%e")
        return time.mktime(time.strptime(told.splitlines()[0], "%Y-%m-%dT%H:%M:%S"))
    except (NoSlurm, ValueError, IndexError) as error:  # "N/A": no limit
        if isinstance(error, NoSlurm):
            say("note", f"the job's time limit is not known: {error}")
        return None


def preempted(job: str) -> bool:
    """Whether a running job is about to make room for another, and has its partition's GraceTime to end."""
    try:
        return facts(job).get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    except NoSlurm as error:
        say("note", f"whether the job was preempted is not known: {error}")
        return False


def requeue(job: str) -> bool:
    """Puts the job back into the queue, under its id; nothing of it runs any more. False where it may not.

    A job that is cancelled, or was submitted with --no-requeue, does not come back.
    """
    try:
        known = facts(job)
        # BatchFlag is 2 where the batch script could not be started at first.
        if known.get("Requeue") != "1" or known.get("BatchFlag", "0") == "0":
            return False
        if known.get("JobState") != "RUNNING":
            return False
        say("requeue", f"job {job} goes back into the queue, and then goes on")
        ask("scontrol", "requeue", job)
    except NoSlurm as error:
        say("note", f"the job could not be requeued: {error}")
        return False
    return True


def resumed_by_slurm(run: Run, environ: Mapping[str, str] = os.environ) -> Run:
    """A job that came back goes on with what it did before, whatever its command says of the first start.

    If it never had the run's folder, what lies there is another's.
    """
    job, count = this_job(environ), restarts(environ)
    if job is None or not count or not started(run.folder, job) or not holds_run(run.folder):
        return run
    return run.changed(f"SLURM restarted the job (SLURM_RESTART_COUNT={count})", resume=True, overwrite=False)
