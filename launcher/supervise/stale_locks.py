"""Remove locks of torch's compiler that a killed process left: every later run would wait for them forever.

A lock must stay while anybody builds: a rank of another run, a plain script, a process of another user, of a
container, or of another machine. Nobody does if all of this is true:

1. No compiler runs in the folder of the lock. It may go on when the process that started it was killed.
2. Nobody has the lock open. torch keeps it open while it builds (torch.utils.file_baton). The kernel knows
   for all processes of this machine, whatever their user or container: it gives a write lease on a file only
   if nobody else has it open. It does not know processes of other machines, so the file system must be one
   that only this machine has.
3. On another file system: the lock names its owner (trainers/rank/build_lock.py), a process of this machine
   that has ended; or the lock is older than any build, and no process that we see has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from trainers.rank.build_lock import owner_has_ended

OLD = 600.0  # seconds; no operator takes that long, if a process of another machine has the lock
RELEASE_SECONDS = 0.5  # between two looks at a lock
EXPORTS = Path("/var/lib/nfs/etab")
# File systems that one machine has alone, if it does not export them.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "overlay"}


def extensions_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder in which torch keeps what it compiles."""
    home = Path(environ.get("HOME", "/"))
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def remove_stale_locks(cache: Path) -> list[Path]:
    """Remove the locks of builds that have ended. Return the locks that were removed."""
    ended = {lock: found for lock in _locks(cache) if (found := _ended(lock))}
    if not ended:
        return []
    # A builder that has finished closes its lock just before it removes it. It does so meanwhile.
    time.sleep(RELEASE_SECONDS)
    return [lock for lock, found in ended.items() if _remove(lock, found)]


def _remove(lock: Path, found: tuple[int, int]) -> bool:
    """Remove a lock if it is still the one that was found. Return whether it was removed.

    Only one launcher at a time does so: else it could remove a new lock in the place of one that another
    launcher has just removed.
    """
    number = os.open(lock.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(number, fcntl.LOCK_EX)
        if _ended(lock) != found:
            return False
        lock.unlink()
        return True
    finally:
        os.close(number)


def _locks(cache: Path) -> list[Path]:
    return [*cache.glob("*/lock"), *cache.glob("*/*/lock")]


def _ended(lock: Path) -> tuple[int, int] | None:
    """Return what identifies a lock whose build has ended, as far as this machine can know, else None."""
    try:
        found = lock.stat()
    except OSError:
        return None  # released meanwhile
    if _builds_in(lock.parent):
        return None
    opened = _is_open(lock) if _is_of_this_machine(lock.parent) else None
    if opened is None:  # the kernel of this machine cannot know
        ended = owner_has_ended(lock)
        old = time.time() - found.st_mtime > OLD and not _is_seen_open(lock)
        opened = not (old if ended is None else ended)
    return None if opened else (found.st_ino, found.st_mtime_ns)


def _is_of_this_machine(folder: Path) -> bool:
    """Whether no other machine can have a file of a folder open."""
    real = folder.resolve()
    return file_system(real) in LOCAL and not any(real.is_relative_to(path) for path in _exported())


def _exported() -> list[Path]:
    """Return the folders that this machine gives to others as an NFS server."""
    if not EXPORTS.is_file():
        return []
    lines = EXPORTS.read_text(errors="surrogateescape").splitlines()
    return [_plain(line.split()[0]) for line in lines if line.strip()]


def file_system(folder: Path) -> str:
    """Return the type of the file system that has a folder.

    It looks at names only: to ask a mount whose server is gone would take forever.
    """
    real, best, kind = folder.resolve(), 0, ""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        # 36 35 98:0 /root /mount options optional fields - type source options
        before, _, after = line.partition(" - ")
        mount = _plain(before.split()[4])
        if real.is_relative_to(mount) and len(mount.parts) >= best:  # a later mount hides an earlier one
            best, kind = len(mount.parts), after.split()[0]
    return kind


def _plain(name: str) -> Path:
    """Return a path as it is: the kernel writes a space as \\040."""
    return Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name))


def _is_open(path: Path) -> bool | None:
    """Return whether any process of this machine has a file open. None: the kernel does not say."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None  # of another user
    try:
        # A process that opens the file while we hold the lease makes the kernel send us this signal.
        # The usual one, SIGIO, would end this process; nothing happens on SIGURG.
        fcntl.fcntl(number, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None  # the file system has no leases, or the file is another user's
    finally:
        os.close(number)
    return False


def _is_seen_open(lock: Path) -> bool:
    """Whether a process that we may look into has a lock open."""
    links = (link for folder in Path("/proc").glob("[0-9]*/fd") for link in _links(folder))
    return any(_leads_to(link, lock) for link in links)


def _builds_in(folder: Path) -> bool:
    """Whether a process has this working folder, as ninja and its compilers have."""
    return any(_leads_to(link, folder) for link in Path("/proc").glob("[0-9]*/cwd"))


def _links(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []  # the process has ended, or is another user's


def _leads_to(link: Path, path: Path) -> bool:
    """Whether a link of /proc leads to a file or folder. In a container it may have another path.

    The name is compared first: other links may lead to a server that is gone, which would answer never.
    """
    try:
        return os.path.basename(os.readlink(link)) == path.name and link.samefile(path)
    except OSError:
        return False  # the process has ended, or is another user's
