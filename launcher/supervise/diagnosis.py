"""Why an attempt failed: the rank that failed first, the class of its failure, and what mends it."""

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
    USAGE_ERROR,
)
from trainers.rank.failures import BatchTooLarge
from trainers.rank.protocol import AttemptFiles, ErrorNote, read_notes
from trainers.rank.say import say

LOG_LINES = 25  # of a failed rank's log that are shown
STACK_LINES = 12
# Errors that the same code makes again: a fresh launch would only repeat them.
_OF_THE_CODE = frozenset({
    "AssertionError", "AttributeError", "ImportError", "IndexError", "KeyError", "ModuleNotFoundError",
    "NameError", "NotImplementedError", "SyntaxError", "TypeError", "UnboundLocalError", "ValueError",
})  # fmt: skip
# Class of the failure -> (its name, whether a fresh launch can mend it, what the user can do).
CLASSES = {
    RUN_FAILED: ("code", True, "The traceback is in the log of that rank."),
    OUT_OF_MEMORY: ("out of memory", False, ""),  # launcher/plan/batch_search.py says what to change
    KILLED: (
        "killed",
        True,
        "The system kills a process when the memory of the host runs out (see dmesg); lower "
        "dataloader_num_workers, or ask for more memory.",
    ),
    PEER_LOST: (
        "lost peer",
        True,
        "Another machine or the network went away: look at the logs of all machines.",
    ),
    NOT_FINITE: (
        "NaN",
        False,
        "Look at the batches in the file; lower lr or max_grad_norm, warm up longer, or use bf16 in "
        "place of fp16.",
    ),
    DATA_FAILED: (
        "data",
        False,
        "The traceback names the row or the file; docs/data.md says what rows may be.",
    ),
    DISK_FAILED: ("disk", False, "Make room, or lower save_total_limit; then go on with --resume."),
    HUNG: (
        "hung",
        True,
        "Its stack is above. If a step really takes so long, raise launch.hang_timeout.",
    ),
}


@dataclass(frozen=True)
class Failure:
    """The rank that failed first (None: none could say), the reason in a line, and its class."""

    rank: int | None
    reason: str
    code: int = RUN_FAILED
    of_batches: bool = False  # it ran out of memory, and a smaller micro-batch needs less
    repeats: bool = False  # the same code fails again
    stack: str = ""
    waits: bool = False  # a hang that may be of another rank: it waits for others

    def mendable(self, restart_on_nan: bool) -> bool:
        """Whether a fresh launch may go further."""
        if self.code == USAGE_ERROR or self.repeats:
            return False
        return CLASSES[self.code][1] or (self.code == NOT_FINITE and restart_on_nan)

    @property
    def line(self) -> str:
        who = "the launch failed" if self.rank is None else f"rank {self.rank} failed first"
        kind = "" if self.code in (RUN_FAILED, KILLED, HUNG) else f" ({CLASSES[self.code][0]})"
        return f"{who}{kind}: {self.reason}"


def diagnose(outcome: Outcome) -> Failure:
    """Which rank failed first, and why.

    Memory that ran out is a cause, never a consequence. A rank that was killed from outside, or hangs, comes
    before the errors that its peers report.
    """
    notes = read_notes(outcome.files.folder, ErrorNote)
    notes.sort(key=lambda note: (note.peer_lost, note.time))
    short = [note for note in notes if note.code == OUT_OF_MEMORY]
    if short:
        return _noted(short[0])
    if outcome.hang is not None:
        hang = outcome.hang
        return Failure(hang.rank, hang.reason, HUNG, stack=hang.stack, waits=hang.waits)
    own = [note for note in notes if not note.peer_lost]
    for rank, code in outcome.exits.items():
        # After an error of a rank its peers may be aborted, by NCCL's watchdog or by torchrun; the launcher
        # knows the order of the ends of forked ranks.
        killed = -code == signal.SIGKILL and (
            outcome.first == rank or not any(_noted(n).repeats for n in own)
        )
        if code < 0 and (killed or not own):
            hint = " (host memory ran out, or by hand)" if -code == signal.SIGKILL else ""
            return Failure(rank, f"killed by {signal.Signals(-code).name}{hint}", KILLED)
    if notes:
        return _noted(notes[0])
    if outcome.cut:
        return Failure(None, "it had ended on another machine", PEER_LOST)
    for rank, code in outcome.exits.items():
        if code:
            kind = code if code in CLASSES else RUN_FAILED
            return Failure(rank, f"it exited with code {code} and left no word", kind)
    if outcome.code == -signal.SIGKILL:
        return Failure(None, "the process above the ranks was killed by SIGKILL", KILLED)
    return Failure(None, "it ended before a rank could say why; its log is above", RUN_FAILED)


def _noted(note: ErrorNote) -> Failure:
    """What the note of a rank says."""
    if note.code == USAGE_ERROR:
        return Failure(note.rank, note.message, USAGE_ERROR)
    first = next(iter(note.message.strip().splitlines()), "")
    repeats = note.code == RUN_FAILED and note.type in _OF_THE_CODE
    of_batches = note.type == BatchTooLarge.__name__
    return Failure(note.rank, f"{note.type}: {first}", note.code, of_batches, repeats)


def report(failure: Failure, files: AttemptFiles, shown: int, lines: Sequence[str] = ()) -> int:
    """Prints what went wrong, last things last, and returns the exit code.

    `shown` is the rank whose log the terminal has already; `lines` say what else to do.
    """
    if failure.code == USAGE_ERROR:
        say("error", failure.reason)
        return USAGE_ERROR
    log = files.launcher_log if failure.rank is None else files.rank(failure.rank).log
    if log.exists() and failure.rank != shown:
        _quote(f"end of {log}", log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    if failure.stack:
        main_thread = failure.stack.partition("Current thread")[2].splitlines()[1 : 1 + STACK_LINES]
        _quote(f"stack of rank {failure.rank}", [line.strip() for line in main_thread])
    mend = CLASSES[failure.code][2]
    say("error", failure.line, *([mend] if mend else []), *lines, f"logs of all ranks: {files.folder}")
    return failure.code


def _quote(title: str, lines: Sequence[str]) -> None:
    """Print what a rank wrote, before the error."""
    print(f"--- {title}", *(f"    {line}" for line in lines), sep="\n", file=sys.stderr)
