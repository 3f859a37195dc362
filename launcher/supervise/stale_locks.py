"""Remove locks of torch's compiler that a killed process left: every later run would wait for them forever.

While torch compiles an operator (such as DeepSpeed's), a file named `lock` exists in the cache of extensions.
The file itself is the lock, so a process that is killed leaves the lock behind (torch.utils.file_baton).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

OLD = 600.0  # seconds; no operator takes that long, if a process of another machine has the lock


def extensions_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder in which torch keeps what it compiles."""
    home = Path(environ.get("HOME", "/"))
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def remove_stale_locks(cache: Path, since: float) -> list[Path]:
    """Remove locks that no process of this machine has open, and that are from this start or older than OLD.

    `since` is the time of this start, in seconds as time.time(). Return the locks that were removed.
    """
    removed = []
    for lock in [*cache.glob("*/lock"), *cache.glob("*/*/lock")]:
        try:
            written = lock.stat().st_mtime
        except OSError:
            continue  # released meanwhile
        removable = written >= since or time.time() - written > OLD
        if removable and not _is_open(lock, Path("/proc").glob("[0-9]*/fd")):
            lock.unlink(missing_ok=True)
            removed.append(lock)
    return removed


def _is_open(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a process of this user has a file open. `folders` are the /proc/PID/fd of all processes."""
    for folder in folders:
        try:
            if any(os.readlink(link) == str(path) for link in folder.iterdir()):
                return True
        except FileNotFoundError:
            continue  # the process has ended
        except PermissionError:
            continue  # a process of another user, who has another cache
    return False
