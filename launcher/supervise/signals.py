"""Signals to the launcher, and how they reach the ranks."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from types import FrameType

from trainers.rank import terminal
from trainers.rank.signals import heard


class Signals:
    """A handler that passes the signals of trainers/rank/signals.py from the launcher to each rank, once.

    The ranks then save and end. After a second SIGINT or SIGTERM they are killed, but not after a second
    SIGHUP: when a terminal closes, its shell and the kernel send one each.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.twice = False
        self.running = False  # whether there are ranks that can save
        self.passed: set[int] = set()  # pids

    def __enter__(self) -> Signals:
        self.old = {number: signal.signal(number, self._handle) for number in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        ends = (signal.SIGINT, signal.SIGTERM)
        if self.received is None:
            name = signal.Signals(number).name
            what = "the ranks save at the end of this step, then stop" if self.running else "the run stops"
            line = f"{name}: {what}\n"
            terminal.write(terminal.STDERR, line.encode())  # print() could not be called within itself
            self.received = number
        elif number in ends and self.received in ends:
            self.twice = True
        elif number in ends:  # after a warning, the user or SLURM ends the run
            self.received = number

    def pass_on(self, ranks: Mapping[int, int]) -> None:
        """Pass the received signal to the ranks that have not got it yet."""
        for pid in ranks.values() if self.received is not None else ():
            if pid not in self.passed:
                self.passed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self.received or signal.SIGTERM)
