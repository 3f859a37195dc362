"""The processes of a measured run. They inherit its TMPDIR, a folder that is only its own: its mark."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

TICK = 0.01  # seconds between two looks


def belongs(pid: int | str, mark: Path) -> bool:
    """Return whether `mark` is the TMPDIR of a process. Children inherit it."""
    with suppress(OSError):
        return f"TMPDIR={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def members(mark: Path) -> list[int]:
    """Return the ids of all processes that belong to `mark`."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if belongs(path.name, mark)]


def end_all(mark: Path) -> None:
    """Kill all processes that belong to `mark`, and wait until they are gone."""
    while left := members(mark):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(TICK)


def memory_of(pid: int) -> tuple[int, int]:
    """Return the PSS of a process, and the bytes that it shares with no other process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    sizes = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    return sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]
