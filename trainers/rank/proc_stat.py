"""What the kernel says about a process: in /proc/PID/stat, and when it ends."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """The fields of proc(5) that we need. Times are in clock ticks."""

    state: str  # T, t: stopped; Z, X: ended
    parent: int
    session: int
    cpu: int  # with that of children that have ended
    start: int  # since the machine has booted


def read_stat(pid: int) -> ProcessStat:
    """Return what the kernel says about a process.

    Raises:
        OSError: there is no such process.
    """
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(") ")[2].split()  # the name before may have spaces and brackets
    return ProcessStat(
        fields[0], int(fields[1]), int(fields[3]), sum(map(int, fields[11:15])), int(fields[19])
    )


def watch(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends, or None if it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def pids() -> list[int]:
    """Return the ids of all processes that /proc shows."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]
