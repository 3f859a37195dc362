"""The jobs of a run, recorded in its folder: which were submitted, and the run's step when each started."""

from __future__ import annotations

import contextlib
import json
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from trainers.config.json_text import parse_json
from trainers.rank import no_links
from trainers.storage.run_files import JOBS


def note(folder: Path, job: str, step: int | None = None, restart: int = 0) -> None:
    """Record that a job was submitted or, with the step that the run has reached, that it started.

    `restart` is SLURM's count of the job's restarts.
    """
    _add(folder, job, step=step, restart=restart)


def note_end(folder: Path, job: str) -> None:
    """Record that a run has ended within a job. The job may continue with other runs."""
    _add(folder, job, end=True)


def _add(folder: Path, job: str, **what: Any) -> None:
    with no_links.open_file(folder, folder / JOBS, "a") as file:
        file.write(json.dumps({"job": job, "time": round(time.time()), **what}) + "\n")


def jobs(folder: Path) -> list[str]:
    """Return the jobs of a run. The job that was submitted or started last is the last one."""
    latest_first = dict.fromkeys(entry["job"] for entry in reversed(_entries(folder)) if "end" not in entry)
    return list(reversed(latest_first))


def last_job(folder: Path) -> str | None:
    """Return the job that was submitted or started last, or None if there is none."""
    return next(reversed(jobs(folder)), None)


def started(folder: Path, job: str) -> bool:
    """Whether a job has started in the run's folder before."""
    return bool(_starts(folder, job))


def ended(folder: Path, job: str) -> bool:
    """Whether the run has ended within the job since it last started there."""
    entries = [entry for entry in _entries(folder) if entry["job"] == job]
    return bool(entries) and "end" in entries[-1]


def starts_without_progress(folder: Path, job: str) -> int:
    """Return how many starts of a job in a row, before the last one, made no progress.

    If one start of a job has several runs in the same folder, one after the other, they count as one.
    """
    steps = list({entry.get("restart", 0): entry["step"] for entry in _starts(folder, job)}.values())
    return sum(1 for _ in takewhile(lambda step: step == steps[-1], reversed(steps[:-1])))


def _starts(folder: Path, job: str) -> list[dict[str, Any]]:
    return [entry for entry in _entries(folder) if entry["job"] == job and entry.get("step") is not None]


def _entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / JOBS
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        # On a network file system two machines may write into the same line.
        with contextlib.suppress(json.JSONDecodeError):
            found.append(parse_json(line))
    return found
