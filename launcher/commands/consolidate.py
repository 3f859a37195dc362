"""`phalanx consolidate RUN|CHECKPOINT`: picks the checkpoint; trainers/consolidate.py does the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.storage.manifest import CHECKPOINT_PREFIX, complaint, newest_usable


def run(source: Path, output: Path | None) -> int:
    """Returns the exit code of the work.

    Raises:
        ConfigError: there is no checkpoint that verifies.
    """
    if source.name.startswith(CHECKPOINT_PREFIX):
        checkpoint: Path | None = source
        if why := complaint(source, content=True):
            raise ConfigError(
                f"{source}: {why}. The other checkpoints of the run may verify: give its folder."
            )
    else:
        checkpoint, passed = newest_usable(source, content=True)
        for line in passed:
            print(line, file=sys.stderr)
    if checkpoint is None:
        raise ConfigError(f"{source}: there is no checkpoint that verifies.")
    target = output or checkpoint.with_name(f"{checkpoint.name}-model")
    argv = [sys.executable, "-m", "trainers.consolidate", str(checkpoint), str(target)]
    return subprocess.run(argv, check=False).returncode
