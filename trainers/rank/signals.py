"""Signals that ask a rank to stop: SIGTERM, SIGINT, and the scheduler's warnings SIGUSR1 and SIGUSR2.

One rank may see one alone, so a handler only takes note; the ranks agree on it at a step boundary
(trainers/rank/agreement.py). Before there is anything to save, a rank stops where it is.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# On this one a rank writes its Python stack to rank-N.stack, in C, whoever holds the interpreter.
STACK_SIGNAL = signal.SIGRTMIN + 3


class StopNow(BaseException):
    """Raised by the handler where nothing is to be saved yet, or on a second SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """What this rank was asked."""

    def __init__(self) -> None:
        self.requested = 0  # the signal; 0 where none came
        self.at_once = True  # nothing is to be saved yet
        self.saved: str | None = None  # what was saved when the run stopped, for the launcher

    def listen(self) -> None:
        """Takes the signals over; call it in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=_take_defaults)  # a worker of a data loader is no rank

    def training(self) -> None:
        """From here on all ranks stop together, at a step boundary.

        Raises:
            StopNow: asked before, in a moment when Python drops what a handler raises (a finalizer).
        """
        if self.requested:
            raise StopNow(self.requested)
        self.at_once = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.requested == signal.SIGINT == number
        self.requested = number
        if self.at_once or again:
            self.at_once = False  # once: what unwinds must not be interrupted
            raise StopNow(number)


def _take_defaults() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


stop = Stop()
