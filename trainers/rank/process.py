"""The first and last thing a rank does: its own log file, and a note of what stopped it.

The launcher says where (protocol.py); a rank started by hand writes to the terminal as usual.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from trainers.config.errors import SAVED, USAGE_ERROR, ConfigError
from trainers.rank.failures import BatchTooLarge, code_of, is_lost_peer
from trainers.rank.heartbeat import heart
from trainers.rank.protocol import LIVE, LOG_DIR, ErrorNote, RankFiles, StopNote, write_note
from trainers.rank.say import say
from trainers.rank.signals import STACK_SIGNAL, StopNow, stop

_PR_SET_PDEATHSIG = 1
LONGEST_MESSAGE = 2000  # characters of an error that its note keeps
# Ranks that were started by hand have nobody who could start them again.
BY_HAND = (
    "Lower batch_size and raise gradient_accumulation; or let the launcher find them, which alone can start "
    "the ranks again: phalanx train config.yaml --auto-find-batch-size."
)


def rank() -> int:
    """This process's rank over all machines; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def log_folder() -> Path | None:
    """The attempt's folder, if a launcher started this rank."""
    folder = os.environ.get(LOG_DIR)
    return Path(folder) if folder else None


def live_terminal() -> bool:
    """Whether a person watches: the launcher says it, else the terminal itself."""
    return os.environ.get(LIVE, "1" if sys.stdout.isatty() else "0") == "1"


_after_failure: list[Callable[[], None]] = []


def after_failure(action: Callable[[], None]) -> None:
    """What to do once a failure of this rank is noted, however long it takes."""
    _after_failure.append(action)


def run_rank(main: Callable[[], int]) -> int:
    """Runs a rank's main function with its output in its own file, and returns its exit code.

    0: trained; or stopped by a signal, where a launcher reads rank-N.stopped.json. Else what
    docs/exit-codes.md says: a mistake of the user's in one line, other errors with their traceback.
    """
    folder = log_folder()
    if folder is not None:
        files = RankFiles(folder, rank())
        _redirect(files.log)
        _dump_stack_on_signal(files.stack)
        heart.start(rank())
        files.pid.write_text(str(os.getpid()), encoding="utf-8")
        die_with_parent()
    stop.listen()
    try:
        code = main()
        if stop.saved is not None:
            return _stopped(folder, stop.saved)
        if folder is not None:  # else a launcher could not tell it from a rank that was killed
            RankFiles(folder, rank()).done.touch()
        return code
    except StopNow as now:
        return _stopped(folder, "", now.number)
    except ConfigError as error:
        _note(folder, error, USAGE_ERROR)
        if folder is None:  # else the launcher prints it, once for all ranks
            say("error", str(error))
        return USAGE_ERROR
    except Exception as error:
        code = code_of(error)
        _note(folder, error, code)
        traceback.print_exc()
        if isinstance(error, BatchTooLarge) and folder is None:  # else the launcher says what to do
            say("error", f"rank {rank()} ran out of memory. {BY_HAND}")
        for action in _after_failure:
            action()
        return code


def _stopped(folder: Path | None, saved: str, number: int = 0) -> int:
    """The end of a rank that was asked to stop; `saved` says what was saved, or is empty."""
    number = number or stop.requested
    if folder is None:
        say(f"stopped by {signal.Signals(number).name}", saved or "nothing was to be saved yet")
        return SAVED if saved else 128 + number
    write_note(folder, StopNote(rank(), number, saved))
    return 0


def _dump_stack_on_signal(path: Path) -> None:
    """The file stays open for the life of the rank: the handler must not open one."""
    faulthandler.register(STACK_SIGNAL, file=path.open("w"), all_threads=True)


def _redirect(path: Path) -> None:
    """Sends this process's output, that of C++ libraries too, to a file."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(target, stream.fileno())
    os.close(target)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)


def die_with_parent() -> None:
    """A process whose parent was killed outright does not stay behind (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _note(folder: Path | None, error: Exception, code: int) -> None:
    """Leaves what stopped this rank where the launcher finds it; the earliest one is the cause."""
    if folder is None:
        return
    message, kind = str(error)[:LONGEST_MESSAGE], type(error).__name__
    try:
        write_note(folder, ErrorNote(rank(), time.monotonic(), code, kind, message, is_lost_peer(error)))
    except OSError as full:  # the exit code still says the class
        say("warning", f"rank {rank()} could not leave a note: {full}")
