"""Open, write, rename and remove what is below a folder, without following a link there.

A link in a run's folder may lead anywhere. So every folder between the root and the last name is opened by
itself, and the last name too (O_NOFOLLOW). The root itself may be a link. Each function gets the root and a
path below it.

A hard link is a second name of a file, perhaps outside. Before such a file is written, the name in the folder
gets a file of its own.

A process holds the folder of its run (hold()). If that is moved or removed, nothing is
written to its old name.

Nothing else writes into a run's folder; tests/unit/test_writes.py checks it.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from trainers.config.errors import ConfigError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class LinkFound(ConfigError):
    """There is a link where a run would write."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"project_name: {path} is a link, and a run does not write through links in its folder. Remove "
            "the link, or give another project_name."
        )


class FolderMoved(ConfigError):
    """The folder of a run is not any more where the run started."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"project_name: {folder.absolute()} was moved or removed while the run wrote there, so the run "
            "has ended. Move it back, or give its new name as project_name, and continue with --resume."
        )


_held: dict[Path, tuple[int, int]] = {}  # folder of this process's run -> device and inode number


def hold(root: Path) -> None:
    """Refuse from now on to write to this name if it is another folder, or none."""
    found = os.stat(root)
    _held[root.resolve()] = (found.st_dev, found.st_ino)


def release() -> None:
    """Forget the folders that this process holds."""
    _held.clear()


def open_file(root: Path, path: Path, mode: str = "r", part_hard_links: bool = True) -> IO[Any]:
    """Open a file as open() does. A mode that writes also creates the folders above it.

    `part_hard_links`: a file that has other names is replaced by a copy before it is written.

    Raises:
        LinkFound: the file, or a folder between it and the root, is a link.
    """
    with _parent(root, path, make=mode[0] != "r") as folder:

        def no_follow(name: str, flags: int) -> int:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=folder)

        if mode[0] != "r" and part_hard_links and _has_other_names(path.name, folder):
            _part_hard_link(path.name, folder, keep=mode[0] == "a")
        encoding = None if "b" in mode else "utf-8"
        try:
            # The caller closes the file.
            return open(path.name, mode, encoding=encoding, opener=no_follow)
        except OSError as error:
            _refuse_link(path, folder)
            error.filename = str(path)
            raise


def part_of(name: str) -> str:
    """Return the name under which write() writes before it renames. A killed process may leave it."""
    path = Path(name)
    return str(path.with_name(f".{path.name}.part"))


def write(root: Path, path: Path, text: str) -> None:
    """Write a file atomically: a reader, or a kill at any moment, never sees a part of it.

    A link of this name is replaced, not followed.
    """
    part = Path(part_of(str(path)))
    with naming(path), _parent(root, path, make=True) as folder:
        if _is_link(part.name, folder):
            os.unlink(part.name, dir_fd=folder)
        with open_file(root, part, "w") as file:
            file.write(text)
        os.replace(part.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError of the block: a write names no file, a mkdir only the last part."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def make_folder(root: Path, path: Path) -> Path:
    """Create a folder and those above it, unless they exist, and return it.

    Raises:
        LinkFound: one of them is a link.
    """
    with _parent(root, path / "in it", make=True):
        return path


def remove(root: Path, path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link (not what it leads to), if it exists."""
    with suppress(FileNotFoundError), _parent(root, path) as folder:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(path.name, dir_fd=folder)
        else:
            os.unlink(path.name, dir_fd=folder)


def rename(root: Path, path: Path, target: Path) -> None:
    """Rename a file, a folder or a link within the root. A file or a link at the target is replaced."""
    with _parent(root, path) as source, _parent(root, target) as folder:
        os.replace(path.name, target.name, src_dir_fd=source, dst_dir_fd=folder)


@contextmanager
def _parent(root: Path, path: Path, make: bool = False) -> Iterator[int]:
    """Open the folder of a path below the root, one folder after the other. Yields its descriptor."""
    *above, name = path.relative_to(root).parts
    if ".." in (*above, name):
        raise ValueError(f"{path} is not below {root}")
    folder, here = _open_root(root, make), root
    try:
        for part in above:
            here /= part
            if make:
                with suppress(FileExistsError), naming(here):
                    os.mkdir(part, dir_fd=folder)
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            except OSError as error:
                _refuse_link(here, folder)
                error.filename = str(here)
                raise
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _open_root(root: Path, make: bool) -> int:
    held = _held.get(root.resolve())
    if make and held is None:
        root.resolve().mkdir(parents=True, exist_ok=True)
    try:
        folder = os.open(root, _FOLDER)
    except FileNotFoundError:
        if held is not None:
            raise FolderMoved(root) from None
        raise
    found = os.fstat(folder)
    if held not in (None, (found.st_dev, found.st_ino)):
        os.close(folder)
        raise FolderMoved(root)
    return folder


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _has_other_names(name: str, folder: int) -> bool:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink > 1


def _part_hard_link(name: str, folder: int, keep: bool) -> None:
    """Let a name have a file of its own: a copy, or (without `keep`) none yet."""
    if not keep:
        os.unlink(name, dir_fd=folder)
        return
    part = part_of(name)
    with suppress(FileNotFoundError):
        os.unlink(part, dir_fd=folder)
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with (
        open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as source,
        open(os.open(part, new, 0o666, dir_fd=folder), "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)


def _refuse_link(path: Path, folder: int) -> None:
    if _is_link(path.name, folder):
        raise LinkFound(path) from None


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the mode of new files. safetensors lets only the owner read its files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("Umask:"):
            mode = 0o666 & ~int(line.split()[1], 8)
            for path in folder.iterdir():
                if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
                    path.chmod(mode)
