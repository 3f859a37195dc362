"""The start and the end of a rank: send its output to a log file, and write a note on what stopped it.

The launcher sets the folder (protocol.py). A rank without the launcher writes to the terminal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from trainers.config.errors import SAVED, USAGE_ERROR, ConfigError, Unfinished
from trainers.config.redaction import redacted
from trainers.rank import no_links
from trainers.rank.failures import BatchTooLarge, code_of, is_lost_peer, no_space
from trainers.rank.heartbeat import heart
from trainers.rank.outliving import die_with_parent
from trainers.rank.proc_stat import pids, read_stat
from trainers.rank.protocol import LIVE, LOG_DIR, ErrorNote, RankFiles, StopNote, run_of, write_note
from trainers.rank.say import say
from trainers.rank.signals import STACK_SIGNAL, StopNow, stop
from trainers.rank.terminal import outlive_readers

LONGEST_MESSAGE = 2000  # maximum length of an error's message in its note, in characters
# Only the launcher can start ranks again. This message is for ranks that a user started without it.
BY_HAND = (
    "Lower batch_size and raise gradient_accumulation, or use the launcher, which finds both: phalanx train "
    "config.yaml --auto-find-batch-size."
)


def rank() -> int:
    """Return the rank of this process over all machines; 0 if RANK is not set."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks over all machines; 1 if WORLD_SIZE is not set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def log_folder() -> Path | None:
    """Return the attempt's folder, or None if the launcher did not start this rank."""
    folder = os.environ.get(LOG_DIR)
    return Path(folder) if folder else None


def live_terminal() -> bool:
    """Return whether a person watches the output: the launcher's value, else whether stdout is a terminal."""
    return os.environ.get(LIVE, "1" if sys.stdout.isatty() else "0") == "1"


_after_failure: list[Callable[[], None]] = []


def after_failure(action: Callable[[], None]) -> None:
    """Register an action for the end of a failed rank. It runs after the note, so it may be slow."""
    _after_failure.append(action)


def run_rank(main: Callable[[], int]) -> int:
    """Run the main function of a rank with its output in the rank's log file, and return the exit code.

    The code is 0 if the rank trained, or if a signal stopped it and a launcher reads rank-N.stopped.json.
    Other codes: docs/exit-codes.md. A ConfigError is reported in one line, other errors with a traceback.
    """
    folder = log_folder()
    if folder is not None:
        files = RankFiles(folder, rank())
        _redirect(run_of(folder), files.log)
        no_links.hold(run_of(folder))
        _dump_stack_on_signal(run_of(folder), files.stack)
        heart.start(rank())
        no_links.write(run_of(folder), files.pid, str(os.getpid()))
        die_with_parent()
    else:
        outlive_readers()
    stop.listen()
    try:
        code = main()
        if stop.saved is not None:
            return _stopped(folder, stop.saved)
        if folder is not None:  # else the launcher would take it for a rank that was killed
            no_links.write(run_of(folder), RankFiles(folder, rank()).done, "")
        return code
    except StopNow as now:
        return _leave_threads(_stopped(folder, stop.kept, now.number))
    except ConfigError as error:
        _note(folder, error, USAGE_ERROR)
        if folder is None:  # else the launcher prints it once for all ranks
            say("error", str(error))
        return USAGE_ERROR
    except Exception as error:
        code = code_of(error)
        _note(folder, error, code)
        if not isinstance(error.__cause__, ConfigError):
            sys.stderr.write(redacted(traceback.format_exc()))
        if isinstance(error, Unfinished) and folder is None:
            say("error", str(error))
        if isinstance(error, BatchTooLarge) and folder is None:  # else the launcher prints what to do
            say("error", f"rank {rank()} ran out of memory. {BY_HAND}")
        for action in _after_failure:
            action()
        return code


def _stopped(folder: Path | None, saved: str, number: int = 0) -> int:
    """End a rank after a signal, and return its exit code. `saved`: what was saved, or an empty string."""
    number = number or stop.requested
    if folder is None:
        say(f"stopped by {signal.Signals(number).name}", saved or "there was nothing to save yet")
        return SAVED if saved else 128 + number
    write_note(folder, StopNote(rank(), number, saved))
    return 0


_waited_for: list[threading.Thread] = []


def wait_for(action: Callable[[], object]) -> None:
    """Do something in a thread, and wait for it. A signal ends the wait, and then the rank.

    The hub's client waits for its own threads before it lets an exception through, and they for the hub.
    """
    done: Future[None] = Future()

    def act() -> None:
        try:
            action()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)

    _waited_for.append(threading.Thread(target=act, name="waited for", daemon=True))
    _waited_for[-1].start()
    done.result()


def _leave_threads(code: int) -> int:
    """End the process with this code if it would wait for the threads of an action that a signal ended."""
    if any(thread.is_alive() for thread in _waited_for):
        for action in _after_failure:
            action()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _dump_stack_on_signal(run: Path, path: Path) -> None:
    """Write the Python stacks to a file when STACK_SIGNAL arrives.

    The file stays open while the rank lives, because the signal handler must not open one.
    """
    faulthandler.register(STACK_SIGNAL, file=no_links.open_file(run, path, "w"), all_threads=True)


def _redirect(run: Path, path: Path) -> None:
    """Send the output of this process, including that of C++ libraries, to a file."""
    with no_links.open_file(run, path, "ab") as target:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(target.fileno(), stream.fileno())
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)


def kill_session(leader: int) -> None:
    """Kill all processes of a rank's session.

    They are the rank, its data workers, and compilers, which have their own process groups.
    """
    for pid in pids():
        with contextlib.suppress(OSError):  # it has ended
            if read_stat(pid).session == leader:
                os.kill(pid, signal.SIGKILL)


def _logged(folder: Path) -> int:
    """Return how many bytes this rank's log has."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        return RankFiles(folder, rank()).log.stat().st_size
    return 0


def _note(folder: Path | None, error: Exception, code: int) -> None:
    """Write a note on what stopped this rank. For the launcher, the earliest note is the cause."""
    if folder is None:
        return
    space = no_space(error, [run_of(folder), Path(tempfile.gettempdir()), Path.home()])
    # Unfinished says what is done and what failed, which must stay.
    text = f"{error}; {space}" if space and isinstance(error, Unfinished) else space or str(error)
    message, kind = redacted(text)[:LONGEST_MESSAGE], type(error).__name__
    note = ErrorNote(rank(), time.monotonic(), code, kind, message, is_lost_peer(error), _logged(folder))
    with contextlib.suppress(OSError, ConfigError):  # the exit code still has the kind of failure
        write_note(folder, note)
