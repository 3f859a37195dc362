"""What kind of failure an error of a rank is: the exit code that it stands for. Light: no torch."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from trainers.config.errors import (
    DATA_FAILED,
    DISK_FAILED,
    KILLED,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PEER_LOST,
    RUN_FAILED,
    USAGE_ERROR,
    ConfigError,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_DISK = (*_FULL, errno.EIO, errno.EROFS, errno.ESTALE)
# What safetensors and torch's zip writer say of a full disk; neither raises an OSError.
_FULL_SIGNS = re.compile(r"No space left on device|Disk quota exceeded|\(os error (28|122)\)", re.I)
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error")
# What the other ranks report when one dies: the consequence, not the cause.
_PEER_LOST = re.compile(
    r"Connection (closed|reset)|Broken pipe|NCCL.*(abort|remote)|Socket Timeout|recvValue failed|"
    r"Timed out waiting|DistNetworkError|DistStoreError|Connect(ion)? timeout|failed to connect|"
    r"Application timeout caused pair closure",
    re.I,
)
_KILLED_WORKER = re.compile(r"DataLoader worker \(pid.*\) is killed by signal: Killed")
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process|DataLoader worker \(pid")
# What torch's allocators and the libraries below them say; each comes as a RuntimeError.
_MEMORY_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS, and the CUDA errors that NCCL passes on
    "DefaultCPUAllocator: can't allocate memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, hipBLAS
)


class NotFinite(RuntimeError):
    """A loss or gradient norm was NaN or infinite; every rank raises it at the same step."""


class BatchTooLarge(RuntimeError):
    """Memory ran out while batches were taken: a smaller micro-batch needs less of it."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device, or of the host, did not suffice."""
    if not isinstance(error, RuntimeError):
        return False
    # torch.OutOfMemoryError by its name: the launcher reads modules that import this one, and has no torch.
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, BatchTooLarge) or any(sign in str(error) for sign in _MEMORY_SIGNS)


@contextmanager
def taking_batches() -> Iterator[None]:
    """Memory that runs out in here is BatchTooLarge; elsewhere (loading, saving) a batch is not to blame."""
    try:
        yield
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise BatchTooLarge(str(error)) from error
        raise


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that the file system has no room left, whatever library raises it."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in _FULL:
            return True
        if _FULL_SIGNS.search(str(link)) or _TORCH_WRITER.search(str(link)):
            return True
    return False


def knows_no_locks(error: OSError) -> bool:
    """Whether a lock failed because the file system has none, as some mounts of Lustre and NFS."""
    return error.errno in _NO_LOCKS


def code_of(error: BaseException) -> int:
    """The exit code of the class that an error belongs to (docs/exit-codes.md)."""
    if isinstance(error, ConfigError):
        return USAGE_ERROR
    if ran_out_of_memory(error) or isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if _KILLED_WORKER.search(str(error)):
        return KILLED
    if isinstance(error, NotFinite):
        return NOT_FINITE
    if disk_is_full(error) or any(isinstance(e, OSError) and e.errno in _DISK for e in _chain(error)):
        return DISK_FAILED
    if _WORKER.search(str(error)) or _within_loader(error.__traceback__):
        return DATA_FAILED
    if is_lost_peer(error):
        return PEER_LOST
    return RUN_FAILED


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    return isinstance(error, (RuntimeError, ConnectionError)) and bool(_PEER_LOST.search(str(error)))


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _within_loader(trace: TracebackType | None) -> bool:
    """Whether an error was raised below torch's data loader: a row was read, or a batch collated."""
    while trace is not None:
        if "/torch/utils/data/" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False
