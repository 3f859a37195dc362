"""`phalanx status`: print the state of runs, on any node that sees their folders."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from launcher.slurm.run_state import Status, find_runs, read_status
from trainers.config.text import count_of

HELP = "print the state of runs: step, loss, speed, time left"
USAGE = "[RUN|JOB] [--json]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        help="a run's folder, or a job's id (default: all runs below the working folder)",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def run(target: str | None, as_json: bool) -> int:
    found = [read_status(one.folder, one.job) for one in find_runs(target)]
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    if not found:
        print(f"no runs below {Path.cwd()}")
    for one in found:
        print(line_of(one))
    return 0


def line_of(status: Status) -> str:
    """Return the line that is printed about a run."""
    parts = [status.run, status.state + (f" ({status.reason})" if status.reason else "")]
    if status.job:
        parts.append(f"job {status.job}")
    if status.step is not None:
        parts.append(f"step {status.step}/{status.max_steps}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:.0f} tokens/s")
    if status.seconds_left is not None and status.state in ("RUNNING", "running"):
        hours, rest = divmod(status.seconds_left, 3600)
        parts.append(f"ETA {hours}:{rest // 60:02d}:{rest % 60:02d}")
    if status.attempts > 1:
        parts.append(f"{status.attempts} attempts")
    if status.requeues:
        parts.append(f"requeued {count_of(status.requeues, 'time')}")
    return "  ".join(parts)
