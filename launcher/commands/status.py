"""`phalanx status`: print the state of runs, on any node that sees their folders."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from launcher.slurm.run_state import find_runs, read_status

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
        print(one.line)
    return 0
