"""Classify the errors of a rank: which exit code an error gets. Does not import torch."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from trainers.config.errors import (
    DATA_FAILED,
    DISK_FAILED,
    KILLED,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PEER_LOST,
    RUN_FAILED,
    UNFINISHED,
    USAGE_ERROR,
    ConfigError,
    Unfinished,
)
from trainers.config.text import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# What the system says of a path that the user gave -> what to do.
_REFUSED = {
    errno.EROFS: "Give a folder on a file system that can be written.",
    errno.EACCES: "Give a folder that you may read and write.",
    errno.EPERM: "Give a folder that you may read and write.",
    errno.ENAMETOOLONG: "Give a shorter name: most file systems allow 255 bytes.",
}
_LONGEST_NAME = 100  # characters of a path that is too long, in a message
_DISK = (*_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
# Messages for a full disk without its error number: of safetensors, of datasets, and of torch's zip writer.
_FULL_SIGNS = re.compile(
    r"No space left on device|Disk quota exceeded|\(os error (28|122)\)|Not enough disk space", re.I
)
_TOO_LARGE_SIGNS = re.compile(r"File too large|\(os error 27\)", re.I)
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error")
# Errors of the other ranks when one rank dies: the consequence, not the cause.
_PEER_LOST = re.compile(
    r"Connection (closed|reset)|Broken pipe|NCCL.*(abort|remote)|Socket Timeout|recvValue failed|"
    r"Timed out waiting|DistNetworkError|DistStoreError|Connect(ion)? timeout|failed to connect|"
    r"Application timeout caused pair closure",
    re.I,
)
_KILLED_WORKER = re.compile(r"DataLoader worker \(pid.*\) is killed by signal: Killed")
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process|DataLoader worker \(pid")
# Messages of torch's allocators and of the libraries below them; all are RuntimeErrors.
_MEMORY_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS, and the CUDA errors that NCCL passes on
    "DefaultCPUAllocator: can't allocate memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, hipBLAS
)


class NotFinite(RuntimeError):
    """A loss or gradient norm is NaN or infinite. Every rank raises it at the same step."""


class BatchTooLarge(RuntimeError):
    """Memory ran out while a batch was processed, so a smaller micro-batch may help."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host ran out of memory."""
    if not isinstance(error, RuntimeError):
        return False
    # torch.OutOfMemoryError by its name: the launcher imports this module and must not import torch.
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, BatchTooLarge) or any(sign in str(error) for sign in _MEMORY_SIGNS)


@contextmanager
def batch_memory_errors() -> Iterator[None]:
    """Turn an out-of-memory error in the block into BatchTooLarge.

    Use it only where batches are processed. While a model is loaded or saved, a smaller batch does not help.
    """
    try:
        yield
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise BatchTooLarge(str(error)) from error
        raise


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error means that the file system is full, whichever library raises it."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in _FULL:
            return True
        if _FULL_SIGNS.search(str(link)) or _TORCH_WRITER.search(str(link)):
            return True
    return False


def is_too_large(error: BaseException) -> bool:
    """Return whether an error means that a file reached the limit on its size (EFBIG), as it says itself."""
    return any(
        (isinstance(link, OSError) and link.errno == errno.EFBIG) or _TOO_LARGE_SIGNS.search(str(link))
        for link in _chain(error)
    )


def too_large(error: BaseException, folder: Path) -> OSError | None:
    """Return the error that names the file in a folder that reached the limit on its size, and the limit.

    Returns None if the error is another one. torch's zip writer has one message for this and for a full disk:
    then the file decides.
    """
    reached = _at_limit(folder)
    of_torch = any(_TORCH_WRITER.search(str(link)) for link in _chain(error))
    if not is_too_large(error) and not (reached and of_torch):
        return None
    return OSError(errno.EFBIG, _limit_text(str(reached) if reached else f"a file in {folder}"))


def _at_limit(folder: Path) -> Path | None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return next((path for path in files if path.stat().st_size >= limit), None)


def _limit_text(file: str) -> str:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    size = "that of its file system" if limit == resource.RLIM_INFINITY else format_bytes(limit)
    return f"{file} would exceed the limit on the size of a file (ulimit -f): {size}. Raise the limit"


def no_space(error: BaseException, folders: Sequence[Path]) -> str | None:
    """Return what a full disk kept from being written, which disk it is, and how much it has, in one line.

    For a file that reached the limit on its size, return the file and the limit. Returns None if the error is
    another one, or says so itself. Libraries do not always name the file: then it is in one of `folders`, in
    that which has the least space left.
    """
    limited = is_too_large(error)
    if not limited and not disk_is_full(error):
        return None
    own = [link for link in _chain(error) if isinstance(link, OSError)]
    if any(link.errno in (*_FULL, errno.EFBIG) and link.strerror != os.strerror(link.errno) for link in own):
        return None
    named = [Path(os.fsdecode(link.filename)) for link in own if isinstance(link.filename, (str, bytes))]
    files = [path for path in named if path.parent != Path()] or named
    place = files[0] if files else min(folders, key=_free)
    if limited:
        return _limit_text(str(place) if files else f"a file in {place}")
    disk = next(part for part in (_existing(place), *_existing(place).parents) if part.is_mount())
    return (
        f"there is no space left to write {'' if files else 'in '}{place}: the disk {disk} has "
        f"{format_bytes(_free(place))} free"
    )


def refused_place(error: OSError) -> tuple[str, int] | None:
    """Return an error in one line, and its exit code, if the system refuses a path that the user gave.

    That is a read-only file system, a missing permission, or a name that is too long.
    """
    if error.errno not in _REFUSED or error.filename is None:
        return None
    path = os.fsdecode(error.filename)
    if error.errno == errno.ENAMETOOLONG and len(path) > _LONGEST_NAME:
        path = f"{path[:_LONGEST_NAME]}..."
    code = DISK_FAILED if error.errno in _DISK else USAGE_ERROR
    return f"{path}: {os.strerror(error.errno)}. {_REFUSED[error.errno]}", code


def for_user(error: OSError) -> tuple[str, int] | None:
    """Return an error in one line, and its exit code, if its cause is the disk or a path of the user."""
    if refused := refused_place(error):
        return refused
    limited = is_too_large(error)
    if not limited and not disk_is_full(error):
        return None
    text = no_space(error, [Path(), Path(tempfile.gettempdir())])
    advice = "" if limited else " Free some space."
    return f"{text}.{advice}" if text else f"{error.strerror}.", DISK_FAILED


def _existing(path: Path) -> Path:
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def has_no_locks(error: OSError) -> bool:
    """Return whether a lock failed because the file system has no locks, as some mounts of Lustre and NFS."""
    return error.errno in _NO_LOCKS


def code_of(error: BaseException) -> int:
    """Return the exit code for an error (docs/exit-codes.md)."""
    if isinstance(error, ConfigError):
        return USAGE_ERROR
    if isinstance(error, Unfinished):
        return UNFINISHED
    if ran_out_of_memory(error) or isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if _KILLED_WORKER.search(str(error)):
        return KILLED
    if isinstance(error, NotFinite):
        return NOT_FINITE
    if (
        disk_is_full(error)
        or is_too_large(error)
        or any(isinstance(e, OSError) and e.errno in _DISK for e in _chain(error))
    ):
        return DISK_FAILED
    if _WORKER.search(str(error)) or _within_loader(error.__traceback__):
        return DATA_FAILED
    if is_lost_peer(error):
        return PEER_LOST
    return RUN_FAILED


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error only means that another rank is gone."""
    if isinstance(error, Unfinished):  # it may name a connection to the hub
        return False
    return isinstance(error, (RuntimeError, ConnectionError)) and bool(_PEER_LOST.search(str(error)))


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _within_loader(trace: TracebackType | None) -> bool:
    """Return whether an error was raised in torch's data loader: while a row was read or a batch collated."""
    while trace is not None:
        if "/torch/utils/data/" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False
