"""The cache of prepared data. One process prepares an entry, a folder, while the others wait.

The first process that takes the lock of a folder creates it. Nodes that share the cache share the lock, if
their file system supports locks between nodes. If it does not, two nodes may create the same folder: each
uses a unique name, and the first one to rename its folder wins. The machines of one run avoid this. The
launcher finds out whether this machine has the same cache as machine 0 (supervise/machines.py); if it has,
its ranks wait for those of machine 0.

An entry has the sizes and hashes of its files in files.json, which is written last. Each process verifies an
entry before it uses it, and a damaged one is made again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

from trainers.config.errors import ConfigError
from trainers.config.text import format_bytes
from trainers.rank import no_links
from trainers.rank.failures import disk_is_full, has_no_locks
from trainers.rank.heartbeat import heart
from trainers.rank.process import log_folder, rank
from trainers.rank.protocol import CACHE, WAITS, prepared_mark, run_of
from trainers.rank.say import say
from trainers.storage.manifest import FileEntry, damaged_files, hash_file
from trainers.storage.state_files import read_object

FILES = "files.json"  # in an entry: the size and hash of each of its other files
LOOK_SECONDS = 0.5
ABANDONED_SECONDS = 86_400.0  # seconds after which an unfinished folder of another node counts as abandoned


def cache_folder() -> Path:
    """Return the folder of all caches: $PHALANX_CACHE or ~/.cache/phalanx."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "phalanx")


def cache_root() -> Path:
    """Return the folder of prepared data, in $PHALANX_CACHE or ~/.cache/phalanx. Creates it if it is missing.

    Raises:
        ConfigError: the folder cannot be created.
    """
    root = cache_folder() / "data"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_is_full(error):
            raise _full(next(part for part in root.parents if part.is_dir()), 0) from error
        raise ConfigError(
            f"{CACHE}: the cache folder {root} cannot be created: {error.strerror}. Set {CACHE} to a "
            "folder that you can write to."
        ) from None
    return root


def make_once(folder: Path, make: Callable[[Path], None], needed: int = 0) -> None:
    """Create a folder of the cache unless it exists and verifies. `make` creates it at the path that it gets.

    `needed` is about how many bytes it takes at least, for the message if the disk is full.

    Raises:
        ConfigError: the cache is not writable.
        OSError: the disk of the cache is full.
    """
    found = folder.exists()
    why = _damage(folder) if found else None
    if found and why is None:
        return
    if why is not None and rank() == 0:
        _warn(folder, why)
    _check_writable(folder.parent)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():  # another process may have made it in the meantime
            damage = _damage(folder)
            if damage is None:
                return
            if why is None or rank() != 0:
                _warn(folder, damage)
            _remove(folder)
        part = _part(folder)
        try:
            make(part)
            _write_files(part)
        except Exception as error:
            if not disk_is_full(error):
                raise
            shutil.rmtree(part, ignore_errors=True)
            raise _full(folder.parent, needed) from error
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(part)  # another node was faster


def _write_files(part: Path) -> None:
    """Write the size and hash of each file of an entry."""
    files = []
    for path in sorted(path for path in part.rglob("*") if path.is_file()):
        files.append(asdict(FileEntry(str(path.relative_to(part)), path.stat().st_size, hash_file(path))))
        heart.beat()
    (part / FILES).write_text(json.dumps({"files": files}), encoding="utf-8")


def _damage(folder: Path) -> str | None:
    """Return what is wrong with an entry, in one line, or None if all its files verify."""
    try:
        files = [FileEntry(**entry) for entry in read_object(folder / FILES, "")["files"]]
    except FileNotFoundError:  # an earlier version wrote none
        return f"it has no {FILES}"
    except (ConfigError, KeyError, TypeError):
        return f"its {FILES} cannot be read"
    for file in files:
        heart.beat()
        if found := damaged_files(folder, [file], content=True):
            return found[0]
    return None


def _warn(folder: Path, why: str) -> None:
    say("warning", f"the prepared data in {folder} is damaged: {why}; preparing it again.")


def _remove(folder: Path) -> None:
    """Remove an entry. It first gets another name, so that no process sees a part of it."""
    part = _part(folder)
    try:
        folder.rename(part)
    except OSError as error:
        raise ConfigError(
            f"{CACHE}: {folder} is damaged and cannot be removed: {error.strerror}. Remove it."
        ) from None
    shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def scratch(name: str, needed: int = 0) -> Iterator[Path]:
    """Yield the path of a folder of the cache, which is removed after the block. `needed`: see make_once().

    Raises:
        ConfigError: the cache is not writable.
        OSError: the disk of the cache is full.
    """
    root = cache_root()
    _check_writable(root)
    part = _part(root / name)
    try:
        yield part
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise _full(root, needed) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_writable(root: Path) -> None:
    if not os.access(root, os.W_OK):
        raise ConfigError(
            f"{CACHE}: the cache folder {root} is not writable. Set {CACHE} to a folder that you can "
            "write to."
        )


def _part(folder: Path) -> Path:
    """Return the path where this process makes a folder. What killed processes left is removed."""
    for left in folder.parent.glob(f"{folder.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another node has just removed or renamed it
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    return part


def _full(root: Path, needed: int) -> OSError:
    size = f"about {format_bytes(needed)} or more" if needed else "more space"
    return OSError(
        errno.ENOSPC,
        f"the prepared data needs {size}, and the disk of the cache has "
        f"{format_bytes(shutil.disk_usage(root).free)} left. Free some space, or set {CACHE} to a folder on "
        "another disk",
        str(root),
    )


def _is_abandoned(part: Path) -> bool:
    """Return whether the process that makes an unfinished folder is gone.

    If the process is on another node, only the age of the folder is known.
    """
    host, _, pid = part.name.removesuffix(".part").partition(".")[2].rpartition(".")
    if host == socket.gethostname():
        return not Path("/proc", pid).exists()
    return time.time() - part.stat().st_mtime > ABANDONED_SECONDS


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs. Prints a line if another process holds it for more than 2 seconds."""
    began, announced = time.monotonic(), False
    with path.open("a") as file:
        while not _try_to_lock(file):
            if not announced and rank() == 0 and time.monotonic() - began > 2:
                announced = True
                say("data", "another process prepares it; waiting.")
            heart.beat()  # the kernel frees the lock when its holder dies, so this wait is no hang
            time.sleep(0.1)
        yield


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if not has_no_locks(error):
            raise
    return True


def wait_for_machine_0() -> None:
    """Wait until machine 0 has prepared the data, if this machine shares its cache."""
    while os.environ.get(WAITS) == "1" and not _prepared().exists():
        heart.beat()  # its launcher notices a hang there
        time.sleep(LOOK_SECONDS)


def mark_prepared() -> None:
    """Mark the data of this attempt as prepared. Only rank 0 of a run on several machines does this."""
    if WAITS in os.environ and rank() == 0:
        no_links.write(run_of(_prepared().parent), _prepared(), "")


def _prepared() -> Path:
    """Return attempt-K/prepared, which is next to the folders of the machines."""
    logs = log_folder()
    assert logs is not None, "PHALANX_LOG_DIR is not set: only the launcher sets PHALANX_WAITS_FOR_MACHINE_0"
    return prepared_mark(logs.parent)
