"""The class of a rank's error, which of several errors is the cause, and what is printed about it."""

from __future__ import annotations

import errno
import json
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
from places import REPO
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from launcher.supervise.attempt import Outcome
from launcher.supervise.diagnosis import CLASSES, LOG_LINES, STACK_LINES, Failure, diagnose, report
from launcher.supervise.hangs import Hang
from launcher.supervise.launches import AccelerateLaunch
from trainers.config import errors
from trainers.config.errors import (
    DATA_FAILED,
    DISK_FAILED,
    HUNG,
    KILLED,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PEER_LOST,
    RUN_FAILED,
    SAVED,
    USAGE_ERROR,
    ConfigError,
)
from trainers.rank import process
from trainers.rank.failures import BatchTooLarge, NotFinite, code_of, disk_is_full, is_lost_peer
from trainers.rank.heartbeat import STEP, Heartbeat
from trainers.rank.protocol import AttemptFiles
from trainers.rank.signals import SIGNALS

PAGE = REPO / "docs" / "exit-codes.md"
GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:34567"
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
    ("error", "code"),
    [(NotFinite("planted"), NOT_FINITE), (RuntimeError(GLOO), PEER_LOST), (KeyError("planted"), RUN_FAILED)],
)
def test_a_rank_exits_with_the_code_of_its_error(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHALANX_LOG_DIR", raising=False)
    monkeypatch.setattr(process.stop, "listen", lambda: None)

    def fail() -> int:
        raise error

    assert process.run_rank(fail) == code


def note(folder: Path, number: int, error: Exception, time: float) -> None:
    """Write the note of an error as that rank does (trainers/rank/process.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(number))
        patch.setattr("time.monotonic", lambda: time)
        process._note(folder, error, code_of(error))


def diagnosed(folder: Path, exits: dict[int, int], hang: Hang | None = None, code: int = 1) -> Failure:
    return diagnose(Outcome(AttemptFiles(folder), code, exits, hang))


OOM = BatchTooLarge("CUDA out of memory.")
STACK = (
    "Thread 0x1 (most recent call first):\n  another thread\n\nCurrent thread 0x2 (most recent call first):\n"
    + ("".join(f'  File "f.py", line {n} in f{n}\n' for n in range(20)))
)


def hang(number: int) -> Hang:
    return Hang(number, 75.0, Heartbeat(0.0, 50, 6, 0.5, STEP), stopped=False, stack=STACK)


def test_out_of_memory_has_priority_over_all_other_failures(tmp_path: Path) -> None:
    note(tmp_path, 0, KeyError("planted"), time=1.0)
    note(tmp_path, 2, OOM, time=3.0)
    note(tmp_path, 3, torch.OutOfMemoryError("later"), time=4.0)
    failure = diagnosed(tmp_path, {0: 1, 1: -9, 2: 1, 3: 1}, hang(1))
    assert (failure.rank, failure.code, failure.of_batches) == (2, OUT_OF_MEMORY, True)


def test_out_of_memory_while_loading_is_not_due_to_a_batch(tmp_path: Path) -> None:
    note(tmp_path, 0, torch.OutOfMemoryError("while loading"), time=1.0)
    failure = diagnosed(tmp_path, {0: 1})
    assert (failure.code, failure.of_batches) == (OUT_OF_MEMORY, False)


def test_a_hang_has_priority_over_the_errors_of_its_peers(tmp_path: Path) -> None:
    note(tmp_path, 0, RuntimeError(GLOO), time=1.0)
    note(tmp_path, 2, RuntimeError("any text"), time=2.0)
    failure = diagnosed(tmp_path, {0: 1, 1: -9}, hang(1))
    assert (failure.rank, failure.code, failure.stack) == (1, HUNG, STACK)
    assert failure.reason == "hung: no heartbeat for 75 s, in phase 'step' after step 6"


def test_a_killed_rank_has_priority_over_the_errors_of_its_peers(tmp_path: Path) -> None:
    note(tmp_path, 0, RuntimeError("any text"), time=1.0)
    failure = diagnosed(tmp_path, {0: 1, 1: -signal.SIGKILL})
    assert (failure.rank, failure.code) == (1, KILLED)
    assert failure.reason == "killed by SIGKILL (host memory ran out, or by hand)"


def test_memory_is_suspected_only_after_sigkill(tmp_path: Path) -> None:
    assert diagnosed(tmp_path, {1: -signal.SIGSEGV}).reason == "killed by SIGSEGV"


def test_a_rank_that_its_own_watchdog_aborts_is_not_the_cause(tmp_path: Path) -> None:
    """NCCL's watchdog aborts a rank whose peer has ended (SIGABRT)."""
    note(tmp_path, 1, TypeError("planted"), time=1.0)
    failure = diagnosed(tmp_path, {1: 1, 0: -signal.SIGABRT})
    assert (failure.rank, failure.code, failure.repeats) == (1, RUN_FAILED, True)


def test_the_earliest_error_is_the_cause(tmp_path: Path) -> None:
    note(tmp_path, 0, RuntimeError("later"), time=2.0)
    note(tmp_path, 1, RuntimeError("planted"), time=1.5)
    assert diagnosed(tmp_path, {0: 1, 1: 1}).rank == 1


def test_an_error_has_priority_over_an_earlier_lost_peer(tmp_path: Path) -> None:
    note(tmp_path, 0, RuntimeError(GLOO), time=1.0)
    note(tmp_path, 1, RuntimeError("planted"), time=2.0)
    failure = diagnosed(tmp_path, {0: 1, 1: 1})
    assert (failure.rank, failure.reason) == (1, "RuntimeError: planted")


def test_if_all_ranks_lost_a_peer_the_first_is_reported(tmp_path: Path) -> None:
    note(tmp_path, 0, RuntimeError(GLOO), time=1.0)
    note(tmp_path, 1, RuntimeError(GLOO), time=2.0)
    failure = diagnosed(tmp_path, {0: 1, 1: 1})
    assert (failure.rank, failure.code) == (0, PEER_LOST)


def test_a_rank_without_a_note_is_reported_with_its_exit_code(tmp_path: Path) -> None:
    failure = diagnosed(tmp_path, {0: 0, 1: 7})
    assert (failure.rank, failure.reason) == (1, "it exited with code 7 without reporting an error")


def test_a_failure_may_have_no_rank(tmp_path: Path) -> None:
    failure = diagnosed(tmp_path, {}, code=-signal.SIGKILL)
    assert failure.line == "the launch failed: the parent process of the ranks was killed by SIGKILL"
    assert failure.code == KILLED
    line = diagnosed(tmp_path, {}).line
    assert line.startswith("the launch failed: it ended before a rank could report an error")


def test_a_mistake_of_the_user_is_reported_in_full(tmp_path: Path) -> None:
    note(tmp_path, 1, ConfigError("data.path: one\ntwo"), time=1.0)
    failure = diagnosed(tmp_path, {1: 1})
    assert (failure.code, failure.reason) == (USAGE_ERROR, "data.path: one\ntwo")


def test_only_the_first_line_of_a_message_is_reported(tmp_path: Path) -> None:
    note(tmp_path, 1, RuntimeError("\nfirst\nsecond"), time=1.0)
    assert diagnosed(tmp_path, {1: 1}).reason == "RuntimeError: first"
    note(tmp_path, 1, RuntimeError(""), time=1.0)
    assert diagnosed(tmp_path, {1: 1}).reason == "RuntimeError: "


@pytest.mark.parametrize("written", ["", '{"rank": 0, "time": 12'])
def test_a_truncated_note_does_not_stop_the_diagnosis(tmp_path: Path, written: str) -> None:
    (tmp_path / "rank-0.error.json").write_text(written)
    assert diagnosed(tmp_path, {0: 1}).rank == 0


def test_a_rank_that_cannot_write_its_note_exits_with_the_code_of_its_error(tmp_path: Path) -> None:
    """The disk is full. Of all errors, this one is the most likely to leave no note."""
    (tmp_path / "rank-0.error.json").symlink_to("/dev/full")
    script = """
import errno, sys
from trainers.rank.process import run_rank

def fail():
    raise OSError(errno.ENOSPC, "No space left on device")

sys.exit(run_rank(fail))
"""
    environ = {**os.environ, "PHALANX_LOG_DIR": str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=False)
    assert done.returncode == DISK_FAILED


def test_exit_codes_are_read_from_torchruns_summary(tmp_path: Path) -> None:
    """The summary names two ranks. The one that torchrun ended itself (SIGTERM) is left out."""
    summary = """
============================================================
trainers.sft FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : node07
  rank      : 2 (local_rank: 2)
  exitcode  : -15 (pid: 4713)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 4713
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : node07
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 4712)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4712
============================================================
"""
    launch = AccelerateLaunch(
        [sys.executable, "-c", f"print({summary!r})"], os.environ, AttemptFiles(tmp_path)
    )
    while (code := launch.wait(1.0)) is None:
        pass
    assert (code, launch.exits()) == (0, {1: -9})


@pytest.mark.parametrize(
    ("code", "restarted", "with_restart_on_nan"),
    [
        (RUN_FAILED, True, True),
        (USAGE_ERROR, False, False),
        (OUT_OF_MEMORY, False, False),
        (KILLED, True, True),
        (PEER_LOST, True, True),
        (NOT_FINITE, False, True),
        (DATA_FAILED, False, False),
        (DISK_FAILED, False, False),
        (HUNG, True, True),
    ],
)
def test_which_failures_are_restarted(code: int, restarted: bool, with_restart_on_nan: bool) -> None:
    failure = Failure(0, "planted", code)
    assert (
        failure.restart_may_help(restart_on_nan=False),
        failure.restart_may_help(restart_on_nan=True),
    ) == (
        restarted,
        with_restart_on_nan,
    )


@pytest.mark.parametrize(
    ("error", "restarted"),
    [
        (TypeError("planted"), False),
        (AttributeError("planted"), False),
        (ImportError("planted"), False),
        (KeyError("planted"), False),
        (NotImplementedError("planted"), False),
        (ValueError("planted"), False),
        (AssertionError("planted"), False),
        (RuntimeError("planted"), True),
        (OSError("planted"), True),
        (TimeoutError("planted"), True),
        (RuntimeError(GLOO), True),
    ],
    ids=repr,
)
def test_errors_that_the_same_code_repeats_are_not_restarted(
    tmp_path: Path, error: Exception, restarted: bool
) -> None:
    note(tmp_path, 1, error, time=1.0)
    assert diagnosed(tmp_path, {1: 1}).restart_may_help(restart_on_nan=True) == restarted


def reported(
    failure: Failure,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    shown: int = 0,
    lines: tuple[str, ...] = (),
) -> list[str]:
    assert report(failure, AttemptFiles(folder), shown, lines) == failure.code
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_the_last_lines_say_what_failed_what_to_do_and_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = Failure(0, "killed by SIGKILL (host memory ran out, or by hand)", KILLED)
    assert reported(failure, tmp_path, capsys, lines=("It is not restarted.",)) == [
        "error: rank 0 failed first: killed by SIGKILL (host memory ran out, or by hand)",
        f"       {CLASSES[KILLED][2]}",
        "       It is not restarted.",
        f"       logs of all ranks: {tmp_path}",
    ]


def test_the_end_of_the_log_of_the_rank_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-1.log").write_bytes(b"\n".join(b"line %d \xff" % n for n in range(100)))
    lines = reported(Failure(1, "planted"), tmp_path, capsys)
    assert lines[0] == f"--- end of {tmp_path}/rank-1.log"
    assert lines[1 : 1 + LOG_LINES] == [f"    line {n} \ufffd" for n in range(100 - LOG_LINES, 100)]
    assert lines[1 + LOG_LINES] == "error: rank 1 failed first: planted"


def test_a_log_that_the_terminal_has_is_not_shown_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-1.log").write_text("seen\n")
    assert "    seen" not in reported(Failure(1, "planted"), tmp_path, capsys, shown=1)


def test_without_a_rank_the_log_of_the_launch_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launcher.log").write_text("a line of torchrun\n")
    lines = reported(Failure(None, "it ended"), tmp_path, capsys)
    assert lines[:3] == [f"--- end of {tmp_path}/launcher.log", "    a line of torchrun",
                         "error: the launch failed: it ended"]  # fmt: skip


def test_the_stack_of_a_hang_is_shown_with_the_innermost_frame_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = reported(Failure(1, hang(1).reason, HUNG, stack=STACK), tmp_path, capsys)
    assert lines[0] == "--- stack of rank 1"
    assert lines[1 : 1 + STACK_LINES] == [f'    File "f.py", line {n} in f{n}' for n in range(STACK_LINES)]
    assert lines[1 + STACK_LINES].startswith("error: rank 1 failed first: hung: no heartbeat for 75 s")
    assert "raise launch.hang_timeout" in lines[2 + STACK_LINES]


def test_a_mistake_of_the_user_is_printed_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-1.log").write_text("a log\n")
    failure = Failure(1, "data.path: no row has text", USAGE_ERROR)
    assert reported(failure, tmp_path, capsys) == ["error: data.path: no row has text"]


@pytest.mark.parametrize("code", sorted(CLASSES))
def test_every_class_is_named_and_has_a_fix(
    tmp_path: Path, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = reported(Failure(0, "planted", code), tmp_path, capsys, lines=("the caller's",))
    unnamed = code in (RUN_FAILED, KILLED, HUNG)  # the reason itself names the class
    assert lines[0] == f"error: rank 0 failed first{'' if unnamed else f' ({CLASSES[code][0]})'}: planted"
    assert (len(lines) == 4) == (code != OUT_OF_MEMORY)  # out of memory: the caller says what to change
    assert all(line.startswith("       ") for line in lines[1:])


CODES = {name: value for name, value in vars(errors).items() if name.isupper() and value in range(1, 128)}


def test_every_exit_code_except_usage_error_and_saved_has_a_class() -> None:
    assert len(set(CODES.values())) == len(CODES), "two exit codes are equal"
    assert {USAGE_ERROR, SAVED} < set(CODES.values())
    assert set(CODES.values()) - {USAGE_ERROR, SAVED} == set(CLASSES)


def test_the_page_of_exit_codes_lists_each_code() -> None:
    listed = [
        int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(set(listed)) == len(listed)
    assert {0, *CODES.values()} <= set(listed)
    assert set(listed) <= {0, *CODES.values(), *(128 + number for number in SIGNALS)}


def test_errors_are_classified_without_torch() -> None:
    script = "import sys; from trainers.rank import failures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_note_of_a_rank_has_what_the_diagnosis_reads(tmp_path: Path) -> None:
    note(tmp_path, 3, RuntimeError(GLOO + "x" * 5000), time=12.5)
    written = json.loads((tmp_path / "rank-3.error.json").read_text())
    assert {**written, "message": len(written["message"])} == {
        "rank": 3,
        "time": 12.5,
        "code": PEER_LOST,
        "type": "RuntimeError",
        "message": 2000,
        "peer_lost": True,
    }
