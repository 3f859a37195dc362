"""What a launch reports when it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.supervise.launches import AccelerateLaunch
from trainers.rank.protocol import AttemptFiles


def test_exit_codes_are_read_from_torchruns_summary(tmp_path: Path) -> None:
    """The summary names two ranks. The one that torchrun ended itself (SIGTERM) is left out."""
    summary = """
============================================================
trainers.sft FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : node07
  rank      : 2 (local_rank: 2)
  exitcode  : -15 (pid: 4713)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 4713
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : node07
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 4712)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4712
============================================================
"""
    launch = AccelerateLaunch(
        [sys.executable, "-c", f"print({summary!r})"], os.environ, AttemptFiles(tmp_path)
    )
    while (code := launch.wait(1.0)) is None:
        pass
    assert (code, launch.exits()) == (0, {1: -9})
