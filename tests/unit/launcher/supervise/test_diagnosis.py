"""Which of several errors is the cause, and what is printed about it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from messages import CUDA, GLOO
from places import REPO

from launcher.supervise.attempt import Outcome
from launcher.supervise.diagnosis import CLASSES, LOG_LINES, STACK_LINES, Failure, diagnose, report
from launcher.supervise.hangs import Hang
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
    Unfinished,
)
from trainers.rank import process
from trainers.rank.failures import BatchTooLarge, code_of
from trainers.rank.heartbeat import STEP, Heartbeat
from trainers.rank.library_patches import LibraryMoved
from trainers.rank.protocol import AttemptFiles
from trainers.rank.signals import SIGNALS

PAGE = REPO / "docs" / "exit-codes.md"


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


def test_out_of_memory_has_priority_over_its_consequences(tmp_path: Path) -> None:
    """A rank that lost its peer may be killed by its own watchdog, and may write a note with any text."""
    note(tmp_path, 0, RuntimeError("a collective timed out"), time=1.0)
    note(tmp_path, 1, BatchTooLarge(CUDA), time=2.0)
    failure = diagnosed(tmp_path, {0: -signal.SIGABRT, 1: 1})
    assert (failure.rank, failure.code, failure.of_batches) == (1, OUT_OF_MEMORY, True)
    assert failure.reason == f"BatchTooLarge: {CUDA}"


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
        (LibraryMoved("planted"), False),
        (Unfinished("planted"), False),
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
    # The terminal has not its traceback, because other ranks might be the cause.
    assert "    seen" in reported(Failure(1, "planted", PEER_LOST), tmp_path, capsys, shown=1)


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
        "logged": 0,
    }
