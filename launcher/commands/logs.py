"""`phalanx logs`: print the log of a rank in the newest attempt."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.slurm.job import ENDED
from launcher.slurm.journal import last_job
from launcher.slurm.run_state import find_runs, state_of
from trainers.config.errors import ConfigError
from trainers.rank.protocol import attempts, logged_ranks, rank_logs
from trainers.rank.terminal import is_unread

HELP = "print the log of a rank"
USAGE = "RUN|JOB [--rank N] [--follow]"

FOLLOW_SECONDS = 0.5
STATE_SECONDS = 10.0  # between two checks whether a job is active: the controller has many users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="a run's folder, or a job's id")
    parser.add_argument(
        "--rank", type=int, default=0, metavar="N", help="rank whose log is printed (default: 0)"
    )
    parser.add_argument("--follow", action="store_true", help="print new lines until the run ends")


def run(target: str, rank: int, follow: bool) -> int:
    """Print the log of a rank in the newest attempt. With `follow`, print new lines until the run ends."""
    folder = _one(target)
    seen: Path | None = None
    for path in _logs(folder, rank, follow):
        if path != seen:
            print(f"--- {path}", file=sys.stderr)
        seen = path
    if seen is None:
        found = sorted({number for attempt in attempts(folder).values() for number in logged_ranks(attempt)})
        have = f" There are logs of: {', '.join(map(str, found))}." if found else ""
        raise ConfigError(f"{folder}: there is no log of rank {rank} yet.{have}")
    return 0


def _logs(folder: Path, rank: int, follow: bool) -> Iterator[Path]:
    """Copy what is new in the newest log to the terminal, and yield the log's path.

    It ends with the run, or when nobody reads the output any more (`phalanx logs RUN --follow | head`).
    """
    path, position, ended, asked = None, 0, False, float("-inf")
    while True:
        # Without a job the state is the lock of the run's folder, which is cheap to read.
        if last_job(folder) is None or time.monotonic() - asked >= STATE_SECONDS:
            ended, asked = not follow or not _is_active(folder), time.monotonic()
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
        if ended or is_unread():
            return
        time.sleep(FOLLOW_SECONDS)


def _newest_log(folder: Path, rank: int) -> Path | None:
    newest_first = (attempt for _, attempt in sorted(attempts(folder).items(), reverse=True))
    return next((log for attempt in newest_first for log in rank_logs(attempt, rank)), None)


def _is_active(folder: Path) -> bool:
    """Whether the run may still write logs: it runs, waits in the queue, or its state is unknown."""
    state, _, _ = state_of(folder, last_job(folder))
    return state not in (*ENDED, "ended", "stopped")


def _one(name: str) -> Path:
    found = {target.folder for target in find_runs(name)}
    if len(found) > 1:
        runs = ", ".join(sorted(str(folder) for folder in found))
        raise ConfigError(f"{name}: several runs have this job: {runs}. Give one of them.")
    return found.pop()
