"""Where prepared data lies, and who prepares it: one process, while the others wait.

The first that takes a folder's lock makes it. Nodes that share the cache share the lock, if their file system
knows locks between nodes. If it does not, two nodes may make the same folder: each makes it under a name of
its own, and the first to rename it wins. The machines of one run do not try: the launcher finds out whether
machine 0's cache is this machine's too (supervise/machines.py); then its ranks wait for those of machine 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from trainers.config.errors import ConfigError
from trainers.rank.failures import knows_no_locks
from trainers.rank.process import log_folder, rank
from trainers.rank.protocol import CACHE, WAITS, prepared_mark
from trainers.rank.say import say

LOOK_SECONDS = 0.5
FORGOTTEN = 86_400.0  # seconds after which an unfinished folder of another node is nobody's


def cache_root() -> Path:
    """Where prepared data lies: $PHALANX_CACHE, or ~/.cache/phalanx. Made where it is missing.

    Raises:
        ConfigError: nothing can be written there.
    """
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "phalanx") / "data"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{CACHE}: {root} cannot be made: {error.strerror}. Prepared data lies there; give a "
            "folder that you can write to."
        ) from None
    return root


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Makes a folder of the cache, unless it is there; `make` fills the one that it is given.

    Raises:
        ConfigError: the cache cannot be written to.
    """
    if folder.exists():
        return
    if not os.access(folder.parent, os.W_OK):
        raise ConfigError(f"{CACHE}: {folder.parent} cannot be written to. Prepared data lies there.")
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        for left in folder.parent.glob(f"{folder.name}.*.part"):
            with contextlib.suppress(FileNotFoundError):  # another node was done with it just now
                if _is_nobodys(left):
                    shutil.rmtree(left, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(part)  # another node was sooner


def _is_nobodys(part: Path) -> bool:
    """Whether the process that made an unfinished folder is gone; of one on another node, its age says it."""
    host, _, pid = part.name.removesuffix(".part").partition(".")[2].rpartition(".")
    if host == socket.gethostname():
        return not Path("/proc", pid).exists()
    return time.time() - part.stat().st_mtime > FORGOTTEN


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock; says so where another process has it for longer than a moment."""
    began, told = time.monotonic(), False
    with path.open("a") as file:
        while not _try_to_lock(file):
            if not told and rank() == 0 and time.monotonic() - began > 2:
                told = True
                say("data", "another process is preparing it; waiting.")
            time.sleep(0.1)
        yield


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if not knows_no_locks(error):
            raise
    return True


def wait_for_machine_0() -> None:
    """Where its cache is this machine's too: until its ranks have prepared the data."""
    while os.environ.get(WAITS) == "1" and not _prepared().exists():
        time.sleep(LOOK_SECONDS)


def tell_prepared() -> None:
    """Machine 0's rank 0, where there are others, when the data of this attempt is there."""
    if WAITS in os.environ and rank() == 0:
        _prepared().touch()


def _prepared() -> Path:
    """attempt-K/prepared, beside the folders of the machines."""
    logs = log_folder()
    assert logs is not None, "only the launcher lets a rank wait"
    return prepared_mark(logs.parent)
