"""A socket in the file system between processes of one user, and of nobody else.

What goes over it is the user's: the environment of a run with its tokens, and the lock on its folder. So both
sides check the other one before they send or read a byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from trainers.config.errors import ConfigError

LONGEST = 107  # bytes of a socket's path on Linux
_CREDENTIALS = struct.Struct("3i")  # struct ucred of Linux: pid, uid, gid
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_STAYS = "It is not removed; give another path."
_WHERE = "Use a path in $XDG_RUNTIME_DIR, or in a folder of mode 700."


def connect(path: Path) -> socket.socket:
    """Connect to the process of this user that listens on the socket `path`.

    Raises:
        ConfigError: the socket, its folder, or the process that listens is not only this user's.
        OSError: nobody listens there.
    """
    place = _place(path)
    _check_folder(place.parent)
    found = place.lstat()
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{place} is {_kind(found.st_mode)}, not a socket.")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{place} belongs to user {found.st_uid}, not to user {os.geteuid()}. {_WHERE}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{place} is writable by other users (mode {_mode(found)}). {_WHERE}")
    channel = socket.socket(socket.AF_UNIX)
    try:
        _at(channel.connect, place)
        if (user := peer(channel)[1]) != os.geteuid():
            raise ConfigError(f"a process of user {user} listens on {place}, not of user {os.geteuid()}.")
    except BaseException:
        channel.close()
        raise
    return channel


def check_free(path: Path) -> None:
    """Check that listen() may use a path.

    Raises:
        ConfigError: its folder is not safe, or something is there that is not a socket of this user without
            a listener.
    """
    place = _place(path)
    _check_folder(place.parent)
    try:
        found = place.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{place} is {_kind(found.st_mode)}. {_STAYS}")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{place} is a socket of user {found.st_uid}, not of user {os.geteuid()}. {_STAYS}")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a listener whose queue is full would let this process wait
        try:
            _at(probe.connect, place)
        except ConnectionRefusedError:
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: somebody listens, and the queue is full
                text = f"{place} is a socket of another program ({error.strerror}). {_STAYS}"
                raise ConfigError(text) from None
            raise ConfigError(
                f"a process listens on {place} already. End it, or give another path."
            ) from None
        pid = peer(probe)[0]
    raise ConfigError(f"process {pid} listens on {place} already. End it, or give another path.")


def listen(path: Path) -> socket.socket:
    """Listen on a new socket `path`, only for this user. A socket that an ended process left is replaced.

    Raises:
        ConfigError: as check_free().
    """
    place = _place(path)
    with _one_at_a_time(place.parent):  # else two processes could both replace the same socket
        check_free(place)
        place.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            _at(listener.bind, place)
        finally:
            os.umask(mask)
        place.chmod(0o600)  # a folder with a default ACL ignores the umask; nobody can connect yet
        listener.listen()
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """Wait for a connection. Return None if it is from a process of another user: it is closed unread."""
    channel, _ = listener.accept()
    if peer(channel)[1] == os.geteuid():
        return channel
    channel.close()
    return None


def peer(channel: socket.socket) -> tuple[int, int]:
    """Return pid and user of the process on the other side, as the kernel noted them at its connect().

    For the side that connects they are those of listen(). The pid is 0 if it is in another container.
    """
    found = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(found)
    return pid, user


def _place(path: Path) -> Path:
    """Return the path with the links of its folder resolved: what is checked is then what is used."""
    folder = path.parent.resolve()
    if not folder.is_dir():
        raise ConfigError(f"{path}: {folder} is not a folder. Create it with mode 700, or give another path.")
    return folder / path.name


def _check_folder(folder: Path) -> None:
    """Check that no other user can replace a socket of this user in a folder.

    Others may be able to write to it if it is sticky, as /tmp is: there only the owner removes a file. Root
    can replace everything anyway.
    """
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{folder} belongs to user {found.st_uid}, not to user {os.geteuid()}. {_WHERE}")
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if shared and not found.st_mode & stat.S_ISVTX:
        raise ConfigError(f"other users can write to {folder} (mode {_mode(found)}). {_WHERE}")


def _at(action: Callable[[str], None], place: Path) -> None:
    """Bind or connect to a path.

    Raises:
        ConfigError: the path is too long.
    """
    if len(os.fsencode(place)) > LONGEST:
        raise ConfigError(f"{place} is too long for a socket (at most {LONGEST} bytes). Give a shorter path.")
    action(str(place))


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes that call this on the same folder waiting while the block runs."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):o}"
