"""The class of an error, from its type and its message."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from messages import CUDA, GLOO
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from trainers.config.errors import (
    DATA_FAILED,
    DISK_FAILED,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PEER_LOST,
    RUN_FAILED,
    USAGE_ERROR,
    ConfigError,
)
from trainers.rank.failures import (
    BatchTooLarge,
    NotFinite,
    batch_memory_errors,
    code_of,
    disk_is_full,
    is_lost_peer,
    no_space,
    ran_out_of_memory,
    too_large,
)


def raised(action: Callable[[], Any]) -> BaseException:
    """Return the error that an action raises, with its traceback."""
    with pytest.raises(Exception) as error:
        action()
    return error.value


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/saving/checkpoint-4/optimizer.pt")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.path: no row has text"), USAGE_ERROR),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OUT_OF_MEMORY),
        (BatchTooLarge("CUDA out of memory."), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 36028797018963968 bytes."), OUT_OF_MEMORY),
        (NotFinite("the loss or the gradient norm is NaN or infinite at step 3"), NOT_FINITE),
        (NO_ROOM, DISK_FAILED),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), DISK_FAILED),
        (OSError("Not enough disk space. Needed: Unknown size (download: Unknown size"), DISK_FAILED),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), DISK_FAILED),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), DISK_FAILED),
        (OSError(errno.EIO, os.strerror(errno.EIO)), DISK_FAILED),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), DISK_FAILED),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), DISK_FAILED),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
         DISK_FAILED),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), DISK_FAILED),
        (RuntimeError("PytorchStreamWriter failed writing file data/4: file write failed"), DISK_FAILED),
        (caused_by(RuntimeError("the checkpoint was not written"), NO_ROOM), DISK_FAILED),
        (CheckpointException("CheckpointException ranks:dict_keys([1])", {1: (NO_ROOM, StackSummary())}),
         DISK_FAILED),
        (ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
                    "last):\n  File \"collate.py\", line 3"), DATA_FAILED),
        (RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"), DATA_FAILED),
        (RuntimeError("DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that "
                      "dataloader's workers are out of shared memory."), DATA_FAILED),
        (RuntimeError(GLOO), PEER_LOST),
        (torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3384, remote process exited or there was a network error"),
         PEER_LOST),
        (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did "
                                            "the remote server shutdown or crash? recvValue failed"),
         PEER_LOST),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv "
                      "operation to complete"), PEER_LOST),
        (RuntimeError("Application timeout caused pair closure"), PEER_LOST),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), PEER_LOST),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), RUN_FAILED),
        (RuntimeError("CUDA error: device-side assert triggered"), RUN_FAILED),
        (ValueError("Connection closed by peer"), RUN_FAILED),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "chat_template.jinja"), RUN_FAILED),
        (KeyError("labels"), RUN_FAILED),
    ],
    ids=lambda part: f"{type(part).__name__}: {str(part)[:40]}" if isinstance(part, Exception) else None,
)  # fmt: skip
def test_the_class_of_an_error(error: Exception, code: int) -> None:
    assert code_of(error) == code


class Rows:
    """A dataset whose third row cannot be read."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or KeyError("messages")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise self.error
        return index


def batches(loader: DataLoader[Any]) -> None:
    """Read all batches. The workers end with the call, not when the traceback is garbage-collected."""
    iterator = iter(loader)
    try:
        list(iterator)
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_row_is_a_data_error(workers: int) -> None:
    assert code_of(raised(lambda: batches(DataLoader(Rows(), num_workers=workers)))) == DATA_FAILED


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_collator_is_a_data_error(workers: int) -> None:
    def collate(rows: list[int]) -> int:
        raise TypeError("planted")

    loader = DataLoader(Rows(), num_workers=workers, collate_fn=collate)
    assert code_of(raised(lambda: batches(loader))) == DATA_FAILED


def test_a_full_disk_while_rows_are_read_is_a_disk_error() -> None:
    assert code_of(raised(lambda: batches(DataLoader(Rows(NO_ROOM))))) == DISK_FAILED


def test_a_worker_process_that_dies_is_a_data_error() -> None:
    class Dies(Rows):
        def __getitem__(self, index: int) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    assert code_of(raised(lambda: batches(DataLoader(Dies(), num_workers=1)))) == DATA_FAILED


def test_torchs_error_for_a_full_disk_is_recognised(tmp_path: Path) -> None:
    """The file is a link to the device, so that a rename over it cannot replace the device."""
    (tmp_path / "full").symlink_to("/dev/full")
    error = raised(lambda: torch.save({"weights": torch.zeros(100_000)}, tmp_path / "full"))
    assert disk_is_full(error) and code_of(error) == DISK_FAILED


def test_an_io_error_is_not_a_full_disk() -> None:
    """If the disk is full, the run only loses that save. Another error ends the run."""
    assert not disk_is_full(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert disk_is_full(NO_ROOM)


def test_a_cycle_of_causes_does_not_loop_forever() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert code_of(one) == RUN_FAILED


def test_a_lost_peer_is_recognised_by_type_and_message() -> None:
    assert is_lost_peer(RuntimeError(GLOO))
    assert not is_lost_peer(RuntimeError("planted"))
    assert not is_lost_peer(ValueError(GLOO))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("planted"),
        RuntimeError(CUDA),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        BatchTooLarge("planted"),
    ],
    ids=str,
)
def test_these_errors_mean_out_of_memory(error: Exception) -> None:
    assert ran_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3456"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. Insufficient shared memory"),
        ValueError("out of memory"),
        ConfigError("batch_size: a number is needed"),
    ],
    ids=str,
)
def test_other_errors_do_not_mean_out_of_memory(error: Exception) -> None:
    assert not ran_out_of_memory(error)


def test_a_real_failed_allocation_means_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert ran_out_of_memory(error.value)


def test_only_errors_while_batches_are_taken_are_batch_too_large() -> None:
    with pytest.raises(BatchTooLarge, match="CUDA out of memory") as error, batch_memory_errors():
        raise torch.OutOfMemoryError(CUDA)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(RuntimeError, match="Connection closed") as other, batch_memory_errors():
        raise RuntimeError("Connection closed by peer")
    assert type(other.value) is RuntimeError


def test_errors_are_classified_without_torch() -> None:
    script = "import sys; from trainers.rank import failures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_message_of_a_full_disk_names_file_disk_and_what_is_free(tmp_path: Path) -> None:
    free = "the disk .* has [0-9.]+ [MG]B free$"
    file = tmp_path / "run" / "metrics.jsonl"
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    assert re.match(rf"there is no space left to write {file}: {free}", str(no_space(error, [tmp_path])))
    for unnamed in (RuntimeError("No space left on device"), OSError("Not enough disk space. Needed: 1")):
        found = str(no_space(unnamed, [tmp_path]))
        assert re.match(rf"there is no space left to write in {tmp_path}: {free}", found), found
    assert no_space(OSError(errno.ENOSPC, "the model needs 3 GB", "run"), [tmp_path]) is None
    assert no_space(OSError(errno.EIO, os.strerror(errno.EIO)), [tmp_path]) is None


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from trainers.rank.failures import code_of, disk_is_full, no_space, too_large

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
folder, weights = Path(sys.argv[1]), {"weight": torch.zeros(100_000)}
writers = {
    "optimizer.pt": lambda path: torch.save(weights, path),
    "metrics.jsonl": lambda path: path.write_bytes(bytes(200_000)),
    "model.safetensors": lambda path: save_file(weights, path),
}
for name, write in writers.items():
    (folder / name).mkdir()
    try:
        write(folder / name / name)
    except Exception as error:
        limited = too_large(error, folder / name)
        print(limited.strerror, code_of(error), code_of(limited), no_space(limited, [folder]))
"""


def test_a_file_over_the_limit_on_its_size_is_named_with_the_limit(tmp_path: Path) -> None:
    """torch's zip writer has the message of a full disk, and safetensors removes its file."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    limit = "would exceed the limit on the size of a file (ulimit -f): 0.1 MB. Raise the limit 8 8 None"
    assert done.stdout.splitlines() == [
        f"{tmp_path}/optimizer.pt/optimizer.pt {limit}",
        f"{tmp_path}/metrics.jsonl/metrics.jsonl {limit}",
        f"a file in {tmp_path}/model.safetensors {limit}",
    ]


def test_the_message_of_a_limit_names_the_file() -> None:
    error = OSError(errno.EFBIG, os.strerror(errno.EFBIG), "run/metrics.jsonl")
    assert str(no_space(error, [Path()])).startswith("run/metrics.jsonl would exceed the limit on the size")
    assert too_large(RuntimeError("unexpected pos 704 vs 598"), Path("/missing")) is None
