"""Locks of torch's compiler that a killed process left: every later run would wait for them for ever.

torch compiles an operator (such as DeepSpeed's) under a file named `lock` in the cache of extensions,
and the file is all there is to it: a process that is killed leaves it (torch.utils.file_baton).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

OLD = 600.0  # seconds; no operator takes as long, should a process of another machine hold the lock


def extensions_cache(environ: Mapping[str, str]) -> Path:
    """Where torch keeps what it compiles."""
    home = Path(environ.get("HOME", "/"))
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def remove_left_locks(cache: Path, since: float) -> list[Path]:
    """Removes the locks that no process of this machine holds open and that are of this start, or old.

    `since` is when this start began, as time.time() gives it. Returns what was removed.
    """
    removed = []
    for lock in [*cache.glob("*/lock"), *cache.glob("*/*/lock")]:
        try:
            written = lock.stat().st_mtime
        except OSError:
            continue  # released meanwhile
        ours = written >= since or time.time() - written > OLD
        if ours and not _is_open(lock, Path("/proc").glob("[0-9]*/fd")):
            lock.unlink(missing_ok=True)
            removed.append(lock)
    return removed


def _is_open(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a process of ours holds a file open."""
    for folder in folders:
        try:
            if any(os.readlink(link) == str(path) for link in folder.iterdir()):
                return True
        except FileNotFoundError:
            continue  # it has ended
        except PermissionError:
            continue  # of another user, whose cache is elsewhere
    return False
