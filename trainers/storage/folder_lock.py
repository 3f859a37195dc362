"""The lock on a run's folder, which one process at a time can have.

It is a lock on the file `.lock`, which names the process, and one on the folder itself: so a second run finds
the folder in use also after somebody has removed the file. Some file servers lock only files.
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainers.config.errors import ConfigError
from trainers.rank import no_links
from trainers.rank.failures import has_no_locks
from trainers.rank.say import say
from trainers.storage.run_files import LOCK


class InUse(ConfigError):
    """Another process holds the lock of the run's folder."""


@dataclass
class Lock:
    """A lock that this process holds. A process that inherits the descriptors holds it too."""

    folder: int  # the descriptor of the folder
    file: IO[str]

    @property
    def descriptors(self) -> list[int]:
        return [self.folder, self.file.fileno()]

    def close(self) -> None:
        os.close(self.folder)
        self.file.close()


_held: list[Lock] = []  # a reference keeps each file open, and so its lock held


def lock_folder(folder: Path) -> Lock:
    """Lock the folder until unlock_folder() or the end of the process. Two runs in it would ruin both.

    Raises:
        InUse: another process holds the lock.
    """
    file = _open(folder)
    whole = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(file, folder)
        if _is_locked(whole, fcntl.LOCK_EX):
            raise _in_use(folder, f"another process; its {LOCK} was removed")
        while (replaced := _was_replaced(file, folder)) or os.fstat(file.fileno()).st_nlink > 1:
            if not replaced:  # a hard link; what else has this file must not change
                no_links.remove(folder, folder / LOCK)
            file.close()
            file = _open(folder)
            _lock(file, folder)
    except BaseException:
        os.close(whole)
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    no_links.hold(folder)
    _held.append(Lock(whole, file))
    return _held[-1]


def _open(folder: Path) -> IO[str]:
    return no_links.open_file(folder, folder / LOCK, "a+", part_hard_links=False)


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise _in_use(folder, file.read().strip() or "just started") from None
    except OSError as error:
        if not has_no_locks(error):
            raise
        say("note", f"{folder} cannot be locked ({error.strerror}); do not start a second run in it")


def _in_use(folder: Path, owner: str) -> InUse:
    return InUse(
        f"project_name: {folder} is in use by another run ({owner}). Wait until it ends, stop it, or "
        "give another project_name."
    )


def _is_locked(whole: int, kind: int) -> bool:
    """Lock a folder. Return whether another process has it; not where only files can be locked (NFS)."""
    try:
        fcntl.flock(whole, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _was_replaced(file: IO[str], folder: Path) -> bool:
    """Return whether the name of the lock has got another file since it was opened."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).lstat())
    except FileNotFoundError:
        return True


def lock_owner(folder: Path) -> tuple[int, str] | None:
    """Return the process that holds the lock, as (pid, machine), or None if the folder is free.

    The result is (0, "") if the process has just taken the lock, or if its file was removed. On a file system
    without locks, only a process on this machine is found.
    """
    path = folder / LOCK
    if path.exists():
        with no_links.open_file(folder, path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError) and not has_no_locks(error):
                    raise
                _, pid, _, host = (file.read().split() or ["", "0", "", ""])[:4]
                alive = host == socket.gethostname() and Path("/proc", pid).exists()
                return (int(pid), host) if isinstance(error, BlockingIOError) or alive else None
    return (0, "") if _folder_is_locked(folder) else None


def refuse_running(folder: Path) -> None:
    """Refuse a folder in which the run of another process is going.

    Raises:
        InUse: another process holds the lock; the message names it.
    """
    held = lock_owner(folder)
    if held is not None and held != (os.getpid(), socket.gethostname()):
        pid, host = held
        raise _in_use(folder, f"process {pid} on {host}" if host else "just started")


def _folder_is_locked(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    whole = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _is_locked(whole, fcntl.LOCK_SH)
    finally:
        os.close(whole)


def unlock_folder() -> None:
    """Release all locks that this process holds."""
    no_links.release()
    while _held:
        _held.pop().close()
