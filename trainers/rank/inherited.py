"""What a process inherits besides its environment: umask, resource limits, CPUs and niceness.

A process that is kept for several runs has those of its own terminal. It takes on those of the launcher that
it serves, so that a run's files and limits do not depend on who imported the libraries.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

_LIMITS = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))


def inherited() -> dict[str, Any]:
    """Return what this process hands down to its children, for JSON."""
    return {
        "umask": _umask(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        "cpus": sorted(os.sched_getaffinity(0)),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }


def _umask() -> int:
    """Return the umask. os.umask() could only tell it by setting it, which other threads would see."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)


def take_on(wanted: dict[str, Any]) -> None:
    """Give this process what another one hands down (inherited()).

    Raises:
        ValueError: this process may not have it; the message names what, and both values.
    """
    mine = inherited()
    os.umask(wanted["umask"])
    for name, limits in wanted["limits"].items():
        if tuple(limits) != tuple(mine["limits"][name]):
            try:
                resource.setrlimit(getattr(resource, name), tuple(limits))
            except (OSError, ValueError):  # only root may raise a hard limit
                raise ValueError(_differs(f"limit {name}", mine["limits"][name], limits)) from None
    if wanted["cpus"] != mine["cpus"]:
        try:
            os.sched_setaffinity(0, wanted["cpus"])
        except OSError:
            raise ValueError(_differs("list of CPUs", mine["cpus"], wanted["cpus"])) from None
    if wanted["niceness"] != mine["niceness"]:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, wanted["niceness"])
        except OSError:
            raise ValueError(_differs("niceness", mine["niceness"], wanted["niceness"])) from None


def _differs(name: str, mine: object, wanted: object) -> str:
    def shown(value: object) -> str:
        return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    return f"its {name} is {shown(mine)}, and cannot be {shown(wanted)} as here"
