"""Why an attempt failed: the rank that failed first, the class of its failure, and how to fix it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.supervise.attempt import Outcome
from trainers.config.errors import (
    DATA_FAILED,
    DISK_FAILED,
    HUNG,
    KILLED,
    NOT_FINITE,
    OUT_OF_MEMORY,
    PEER_LOST,
    RUN_FAILED,
    UNFINISHED,
    USAGE_ERROR,
)
from trainers.config.redaction import redacted
from trainers.rank.failures import BatchTooLarge
from trainers.rank.protocol import AttemptFiles, ErrorNote
from trainers.rank.say import say

LOG_LINES = 25  # lines shown of a failed rank's log
STACK_LINES = 12
# Errors that the same code raises again: a restart would only repeat them.
_REPEATED_ERRORS = frozenset({
    "AssertionError", "AttributeError", "ImportError", "IndexError", "KeyError", "ModuleNotFoundError",
    "NameError", "NotImplementedError", "SyntaxError", "TypeError", "UnboundLocalError", "ValueError",
    "LibraryMoved",  # trainers/rank/library_patches.py
})  # fmt: skip
# Exit code of the class -> (its name, whether a restart can fix the failure, what the user can do).
CLASSES = {
    RUN_FAILED: ("code", True, "The traceback is in the log of that rank."),
    OUT_OF_MEMORY: ("out of memory", False, ""),  # launcher/plan/memory_advice.py says what to change
    KILLED: (
        "killed",
        True,
        "The system kills a process when the memory of the host runs out (see dmesg). Lower "
        "dataloader_num_workers, or request more memory.",
    ),
    PEER_LOST: (
        "lost peer",
        True,
        "Another machine or the network failed: look at the logs of all machines.",
    ),
    NOT_FINITE: (
        "NaN",
        False,
        "Look at the batches in the file that the message names. Lower lr or max_grad_norm, use a longer "
        "warm-up, or use bf16 instead of fp16.",
    ),
    DATA_FAILED: (
        "data",
        False,
        "The traceback names the row or the file. docs/data.md describes valid rows.",
    ),
    DISK_FAILED: (
        "disk",
        False,
        "Free some space, lower save_total_limit, or raise the limit that the message names. Then continue "
        "with --resume.",
    ),
    HUNG: (
        "hung",
        True,
        "Its stack is above. If a step really takes that long, raise launch.hang_timeout.",
    ),
    UNFINISHED: ("unfinished", False, "The model is trained and saved. --resume does what is left."),
}


@dataclass(frozen=True)
class Failure:
    """The rank that failed first (None: unknown), the reason in one line, and the class of the failure."""

    rank: int | None
    reason: str
    code: int = RUN_FAILED
    of_batches: bool = False  # it ran out of memory, and a smaller micro-batch needs less
    repeats: bool = False  # the same code would fail again
    stack: str = ""
    waits: bool = False  # a rank that waits for others: the hang may be in another rank

    def restart_may_help(self, restart_on_nan: bool) -> bool:
        """Whether a restart may fix the failure."""
        if self.code == USAGE_ERROR or self.repeats:
            return False
        return CLASSES[self.code][1] or (self.code == NOT_FINITE and restart_on_nan)

    @property
    def line(self) -> str:
        who = "the launch failed" if self.rank is None else f"rank {self.rank} failed first"
        kind = "" if self.code in (RUN_FAILED, KILLED, HUNG) else f" ({CLASSES[self.code][0]})"
        return f"{who}{kind}: {self.reason}"


def diagnose(outcome: Outcome) -> Failure:
    """Return which rank failed first, and why.

    Running out of memory is always a cause, never a consequence. A rank that was killed from outside, or that
    hangs, has priority over the errors that its peers report.
    """
    notes = outcome.files.notes(ErrorNote)
    notes.sort(key=lambda note: (note.peer_lost, note.time))
    out_of_memory = [note for note in notes if note.code == OUT_OF_MEMORY]
    if out_of_memory:
        return _from_note(out_of_memory[0])
    if outcome.hang is not None:
        hang = outcome.hang
        return Failure(hang.rank, hang.reason, HUNG, stack=hang.stack, waits=hang.waits)
    own_errors = [note for note in notes if not note.peer_lost]
    for rank, code in outcome.exits.items():
        # After an error in one rank, NCCL's watchdog or torchrun may kill its peers. The launcher knows the
        # order in which forked ranks ended.
        killed = -code == signal.SIGKILL and (
            outcome.first == rank or not any(_from_note(n).repeats for n in own_errors)
        )
        if code < 0 and (killed or not own_errors):
            hint = " (host memory ran out, or by hand)" if -code == signal.SIGKILL else ""
            return Failure(rank, f"killed by {signal.Signals(-code).name}{hint}", KILLED)
    if notes:
        return _from_note(notes[0])
    if outcome.ended_elsewhere:
        return Failure(None, "the attempt ended on another machine", PEER_LOST)
    for rank, code in outcome.exits.items():
        if code:
            kind = code if code in CLASSES else RUN_FAILED
            return Failure(rank, f"it exited with code {code} without reporting an error", kind)
    if outcome.code == -signal.SIGKILL:
        return Failure(None, "the parent process of the ranks was killed by SIGKILL", KILLED)
    return Failure(None, "it ended before a rank could report an error; its log is above", RUN_FAILED)


def _from_note(note: ErrorNote) -> Failure:
    """Return the failure that a rank's note reports."""
    if note.code == USAGE_ERROR:
        return Failure(note.rank, note.message, USAGE_ERROR)
    first = next(iter(note.message.strip().splitlines()), "")
    if note.code == UNFINISHED:
        return Failure(note.rank, first, UNFINISHED)
    repeats = note.code == RUN_FAILED and note.type in _REPEATED_ERRORS
    of_batches = note.type == BatchTooLarge.__name__
    return Failure(note.rank, f"{note.type}: {first}", note.code, of_batches, repeats)


def report(failure: Failure, files: AttemptFiles, shown: int, lines: Sequence[str] = ()) -> int:
    """Print the failure, with the most important lines at the end, and return the exit code.

    `shown` is the rank whose log is on the terminal already, but the traceback of a lost peer (watcher.py).
    `lines` say what else the user can do.
    """
    if failure.code == USAGE_ERROR:
        say("error", failure.reason)
        return USAGE_ERROR
    log = files.launcher_log if failure.rank is None else files.rank(failure.rank).log
    if log.exists() and (failure.rank != shown or failure.code == PEER_LOST):
        _show(f"end of {log}", log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    if failure.stack:
        main_thread = failure.stack.partition("Current thread")[2].splitlines()[1 : 1 + STACK_LINES]
        _show(f"stack of rank {failure.rank}", [line.strip() for line in main_thread])
    fix = CLASSES[failure.code][2]
    say("error", failure.line, *([fix] if fix else []), *lines, f"logs of all ranks: {files.folder}")
    return failure.code


def _show(title: str, lines: Sequence[str]) -> None:
    """Print lines that a rank wrote, before the error."""
    print(redacted("\n".join([f"--- {title}", *(f"    {line}" for line in lines)])), file=sys.stderr)
