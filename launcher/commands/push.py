"""`phalanx push RUN`: upload the final model of a run. trainers/push.py does the work."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HELP = "upload the final model of a run to the hub"
USAGE = "RUN [--username NAME]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--username", help="account or organisation on the hub (default: that of the run)")


def run(folder: Path, username: str | None) -> int:
    """Run trainers/push.py and return its exit code."""
    argv = [
        sys.executable,
        "-m",
        "trainers.push",
        str(folder),
        *(["--username", username] if username else []),
    ]
    return subprocess.run(argv, check=False).returncode
