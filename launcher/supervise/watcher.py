"""Watch the ranks of one attempt until they end: exits, hangs, signals, and the log of the first rank."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from launcher.supervise.attempt import Outcome
from launcher.supervise.hangs import HangFinder, SuspensionDetector
from launcher.supervise.launches import POLL_SECONDS, Launch
from launcher.supervise.signals import Signals
from trainers.config.errors import PEER_LOST
from trainers.rank.protocol import AttemptFiles, ErrorNote, StopNote
from trainers.rank.say import say
from trainers.rank.terminal import is_unread

GRACE_SECONDS = 3.0  # for the other ranks to report their errors, after one failed


class OtherEnd(Protocol):
    """How the attempt ended on another machine, if this one must end too."""

    @property
    def stopped(self) -> int:
        """The signal that ended it, or 0."""


def no_other_machine() -> None:
    """Return None: a run on one machine has no end elsewhere."""


@dataclass
class Watcher:
    """A watcher of one attempt on this machine."""

    files: AttemptFiles
    heartbeats: Path
    hang_timeout: float | None
    shown: int  # the rank whose log goes to the terminal
    signals: Signals
    end_on_other_machine: Callable[[], OtherEnd | None] = no_other_machine
    alone: bool = True  # no other machine has ranks of this run

    def follow(self, launch: Launch) -> Outcome:
        """Watch the ranks until all have ended, and return how the attempt ended."""
        deadline = float("inf")
        exits: dict[int, int] = {}
        hang, cut, awake = None, False, SuspensionDetector(self.hang_timeout)
        finder = HangFinder(self.heartbeats, self.hang_timeout, self.files, self.alone)
        with _Tail(self.files, self.shown) as tail:
            while (code := launch.wait(POLL_SECONDS)) is None:
                tail.show()
                now, since = time.monotonic(), awake.look()
                if now < deadline:
                    exits = launch.exits()
                    if -signal.SIGKILL in exits.values():
                        deadline = now  # this is the cause, so do not wait for errors of other ranks
                    elif any(exits.values()):
                        deadline = min(deadline, now + GRACE_SECONDS)
                if (other := self.end_on_other_machine()) is not None:
                    cut = True
                    self.signals.received = self.signals.received or other.stopped or None
                if self._stopped_early() or cut:
                    # Another rank may wait in C++ for data from this one, where it cannot handle a signal.
                    deadline = min(deadline, now + GRACE_SECONDS)
                ranks = launch.ranks()
                self.signals.running = bool(ranks) and now < deadline
                self.signals.pass_on(ranks)
                if hang is None and now < deadline:
                    hang = finder.find(launch.ranks(), since)
                if hang is not None or self.signals.twice or now >= deadline:
                    launch.kill()
            self.signals.running = False
            tail.show()
        if hang is None and not self.signals.twice and time.monotonic() < deadline:
            exits = launch.exits()
        return Outcome(self.files, code, exits, hang, cut)

    def _stopped_early(self) -> bool:
        """Whether a rank stopped before the ranks could agree to stop, with nothing to save.

        Only that rank may have got the signal. Then pass it to the others, as if the launcher had got it.
        """
        early = False
        for note in self.files.notes(StopNote):
            self.signals.received = self.signals.received or note.signal
            early = early or not note.saved
        return early


class _Tail:
    """A reader that copies what is new in the log of a rank to the terminal.

    If the rank fails because another one is gone, its traceback stays in the log: it hides the cause.
    """

    def __init__(self, files: AttemptFiles, rank: int) -> None:
        self.files, self.rank = files, rank
        self.path = files.rank(rank).log
        self.stream: BinaryIO | None = None
        self.unread = False  # whether the terminal or the pipe is gone

    def __enter__(self) -> _Tail:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def show(self) -> None:
        if self.stream is None and self.path.exists():
            self.stream = self.path.open("rb")
        if self.stream is not None and (chunk := self._news(self.stream)):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            if not self.unread and is_unread():
                self.unread = True
                say(
                    "warning", f"nothing takes stdout any more; the run continues, and its log is {self.path}"
                )

    def _news(self, stream: BinaryIO) -> bytes:
        """Return what is new in the log. A rank writes its note before the traceback."""
        begin, chunk = stream.tell(), stream.read()
        if not chunk:
            return chunk
        ends = [n.logged for n in self.files.notes(ErrorNote) if n.rank == self.rank and n.code == PEER_LOST]
        return chunk[: max(ends[0] - begin, 0)] if ends else chunk
