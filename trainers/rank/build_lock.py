"""The owner of a lock of torch's compiler, in the lock file itself.

While torch compiles an operator (such as DeepSpeed's), a file named `lock` exists in the cache of extensions.
The file itself is the lock, so a process that is killed leaves it behind (torch.utils.file_baton), and every
later process waits for it. A rank writes into its locks which process it is (model/deepspeed_builds.py), so
that the launcher can tell whether it still lives.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trainers.config.json_text import parse_json
from trainers.rank.proc_stat import read_stat


def this_process() -> dict[str, Any]:
    """Return what identifies this process among those of all machines, now and later."""
    return {**_where(), "pid": os.getpid(), "start": _start(os.getpid())}


def owner_has_ended(lock: Path) -> bool | None:
    """Return whether the owner in a lock has ended. None: the lock has none, or it is on another machine."""
    try:
        owner = parse_json(lock.read_text(encoding="utf-8"))
        where = {name: owner[name] for name in _where()}
        pid, start = owner["pid"], owner["start"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # empty, as torch writes it, or of another program
    return _start(pid) != start if where == _where() else None


def _where() -> dict[str, Any]:
    """Return this machine since its boot, and the space of its process ids: a container has its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return {"boot": boot, "pids": os.stat("/proc/self/ns/pid").st_ino}


def _start(pid: int) -> int | None:
    """Return when a process started, or None if it has ended. A process id may be used again."""
    try:
        found = read_stat(pid)
    except OSError:
        return None
    return None if found.state in ("Z", "X") else found.start
