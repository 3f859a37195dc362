"""Whether two paths lead to the same place, or one into the other: by links or by bind mounts."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

Key = tuple[object, ...]
Mounts = dict[Path, tuple[str, Path]]  # where -> device, and folder of its file system
_MOUNTS = Path("/proc/self/mountinfo")


class Place:
    """A file or folder, which need not exist, by all that identifies it and the folders above it.

    A name is not enough: a bind mount gives a folder a second name. Its device and inode number are the same,
    but not always those of the folders above. So the path in its file system counts too.
    """

    def __init__(self, path: Path) -> None:
        mounts = _mounts(_read_mounts())
        self.path = path
        self.own = _keys(path, mounts)
        self.keys_above = [(parent, _keys(parent, mounts)) for parent in path.parents]
        self.above = {key for _, keys in self.keys_above for key in keys}
        device, inside = _in_file_system(path, mounts)
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
        for parent, keys in other.keys_above:
            if self.own & keys:
                return other.path.relative_to(parent).as_posix()
        return None


def _keys(path: Path, mounts: Mounts) -> set[Key]:
    """Return what identifies a path: its name, its inode, and its path in its file system."""
    return {("name", path), _inode(path), ("mounted", *_in_file_system(path, mounts))}


def _inode(path: Path) -> Key:
    """Return device and inode number. What does not exist has those of the folder where it would be made."""
    for folder in (path, *path.parents):
        try:
            found = os.stat(folder)
        except OSError:
            continue
        return ("inode", found.st_dev, found.st_ino, path.relative_to(folder))
    return ("inode", path)


def _in_file_system(path: Path, mounts: Mounts) -> tuple[str, Path]:
    """Return the device of the mount that has a path, and the path in that file system."""
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
def _mounts(text: str) -> Mounts:
    """Return what is mounted where."""
    found: Mounts = {}
    for line in text.splitlines():
        _, _, device, root, point, *_ = line.split(" ")
        found[Path(_plain(point))] = device, Path(_plain(root))  # a later mount covers an earlier one
    return found


def _plain(text: str) -> str:
    """Replace the octal codes that mountinfo has in place of spaces and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
