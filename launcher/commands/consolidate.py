"""`phalanx consolidate RUN|CHECKPOINT`: choose the checkpoint; trainers/consolidate.py does the work."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.rank.say import say
from trainers.storage.manifest import CHECKPOINT_PREFIX, newest_usable, why_unusable

HELP = "convert a checkpoint (of a run: the newest) to an ordinary Hugging Face model folder"
USAGE = "RUN|CHECKPOINT [--output FOLDER]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder to write (default: CHECKPOINT-model)"
    )


def run(source: Path, output: Path | None) -> int:
    """Run trainers/consolidate.py and return its exit code.

    Raises:
        ConfigError: there is no such folder, or no checkpoint in it that verifies.
    """
    if not source.is_dir():
        raise ConfigError(
            f"{source}: there is no checkpoint that verifies. The folder does not exist. Give a run's "
            "folder, or one of its checkpoints."
        )
    if source.name.startswith(CHECKPOINT_PREFIX):
        checkpoint: Path | None = source
        if why := why_unusable(source, content=True):
            raise ConfigError(
                f"{source}: {why}. Give the run's folder to use another checkpoint, if one verifies."
            )
    else:
        checkpoint, passed = newest_usable(source, content=True)
        for line in passed:
            say("warning", line)
    if checkpoint is None:
        raise ConfigError(
            f"{source}: there is no checkpoint that verifies. Give a run's folder, or one of its checkpoints."
        )
    target = output or checkpoint.with_name(f"{checkpoint.name}-model")
    argv = [sys.executable, "-m", "trainers.consolidate", str(checkpoint), str(target)]
    return subprocess.run(argv, check=False).returncode
