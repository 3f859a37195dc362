"""Signals that ask a rank to stop: SIGTERM, SIGINT, SIGHUP, and a scheduler's warnings SIGUSR1 and SIGUSR2.

A signal may reach only one rank. So the handler only records it, and the ranks agree on it at a step boundary
(trainers/rank/agreement.py). Before there is anything to save, the rank stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from trainers.rank.outliving import die_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# On this signal a rank writes its Python stack to rank-N.stack, in C, even if the interpreter is blocked.
STACK_SIGNAL = signal.SIGRTMIN + 3


def heard() -> list[signal.Signals]:
    """Return the signals to handle: not SIGHUP if it is ignored, as nohup does for a run that continues."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]


class StopNow(BaseException):
    """Raised by the handler if there is nothing to save yet, or on a second SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """The stop request that this rank received, if any."""

    def __init__(self) -> None:
        self.requested = 0  # number of the signal; 0 if none came
        self.at_once = True  # stop at once, since there is nothing to save yet
        self.saved: str | None = None  # what was saved when the run stopped; for the launcher
        self.kept = ""  # what is safe already, if this rank stops at once

    def listen(self) -> None:
        """Install the handlers. Call it in the main thread."""
        for number in heard():
            signal.signal(number, self._handle)
        main = threading.get_ident()
        os.register_at_fork(after_in_child=lambda: _serve_the_rank(main))

    def training(self) -> None:
        """From now on, only record signals: all ranks stop together, at a step boundary.

        Raises:
            StopNow: a signal came before, while Python dropped the handler's exception (in a finalizer).
        """
        if self.requested:
            raise StopNow(self.requested)
        self.at_once = False

    def agreed(self, number: int) -> None:
        """Record that the ranks have agreed to stop because of a signal (0: none had got one).

        One that came during the exchange stays: the next exchange has it.
        """
        if number:
            self.requested = number

    def finishing(self, kept: str) -> None:
        """From now on, stop at once again: the model is saved, and no other rank waits for this one.

        Raises:
            StopNow: a signal came while the model was saved.
        """
        self.kept = kept
        if self.requested:
            raise StopNow(self.requested)
        self.at_once = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.requested == signal.SIGINT == number
        self.requested = number
        if self.at_once or again:
            self.at_once = False  # raise only once: do not interrupt the cleanup
            raise StopNow(number)


def _serve_the_rank(main: int) -> None:
    """In a process that the rank forks: end with the rank, and do nothing on a signal to all processes.

    The kernel ends it with the thread that forks it, so only if that is the main thread, `main`.

    A terminal and SLURM signal data workers too, and the rank needs them until its save. A pool ends its
    workers by SIGTERM; those of data loaders outlive it (data_workers.py). A handler, unlike SIG_IGN, is not
    passed on to programs that a worker starts.
    """
    if threading.get_ident() == main:
        die_with_parent()
    for number in heard():
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else do_nothing)


def do_nothing(number: int, _: FrameType | None) -> None:
    """Handle a signal that is for another process."""


stop = Stop()
