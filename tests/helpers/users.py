"""Be another user for a moment. Only root can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

OTHER = 65534  # nobody
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
BECOME = f"""
import os, socket, sys

def become_another_user():
    os.setgroups([])
    os.setgid({OTHER})
    os.setuid({OTHER})
"""


@contextmanager
def script(code: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python script in a folder; it can call become_another_user(). Wait for its first line.

    A relative path there needs no access to the folders above, which another user may not have.
    """
    argv = [sys.executable, "-u", "-c", BECOME + code]
    with subprocess.Popen(argv, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()
