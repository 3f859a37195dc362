"""Whether two paths lead to the same place, or one into the other: by links or by bind mounts."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

Key = tuple[object, ...]
_MOUNTS = Path("/proc/self/mountinfo")


class Place:
    """A file or folder, which need not exist, by all that identifies it and the folders above it.

    A name is not enough: a bind mount gives a folder a second name. Its device and inode number are the same,
    but not always those of the folders above. So the path in its file system counts too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.own = _keys(path)
        self.above = {key for parent in path.parents for key in _keys(parent)}
        device, inside = _in_file_system(path)
        self.above |= {("mounted", device, parent) for parent in inside.parents}

    @classmethod
    def of(cls, path: Path) -> Place:
        """Return the place that a path leads to. Links are followed."""
        return cls(path.resolve())

    def is_same(self, other: Place) -> bool:
        """Whether both are the same file or folder."""
        return bool(self.own & other.own)

    def contains(self, other: Place) -> bool:
        """Whether the other one is inside this folder."""
        return bool(self.own & other.above)

    def name_inside(self, other: Place) -> str | None:
        """Return the name of the other one in this folder, or None if it is not inside."""
        for parent in other.path.parents:
            if self.own & _keys(parent):
                return other.path.relative_to(parent).as_posix()
        return None


def _keys(path: Path) -> set[Key]:
    """Return what identifies a path: its name, its inode, and its path in its file system."""
    return {("name", path), _inode(path), ("mounted", *_in_file_system(path))}


def _inode(path: Path) -> Key:
    """Return device and inode number. What does not exist has those of the folder where it would be made."""
    for folder in (path, *path.parents):
        try:
            found = os.stat(folder)
        except OSError:
            continue
        return ("inode", found.st_dev, found.st_ino, path.relative_to(folder))
    return ("inode", path)


def _in_file_system(path: Path) -> tuple[str, Path]:
    """Return the device of the mount that has a path, and the path in that file system."""
    mounts = _mounts(_read_mounts())
    for point in (path, *path.parents):
        if point in mounts:
            device, root = mounts[point]
            return device, root / path.relative_to(point)
    return "", path


def _read_mounts() -> str:
    try:
        return _MOUNTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@lru_cache(maxsize=1)
def _mounts(text: str) -> dict[Path, tuple[str, Path]]:
    """Return where what is mounted: its device, and the folder of its file system."""
    found = {}
    for line in text.splitlines():
        _, _, device, root, point, *_ = line.split(" ")
        found[Path(_plain(point))] = device, Path(_plain(root))  # a later mount covers an earlier one
    return found


def _plain(text: str) -> str:
    """Replace the octal codes that mountinfo has in place of spaces and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
