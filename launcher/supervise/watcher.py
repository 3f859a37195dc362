"""Watches the ranks of one attempt to their end: exits, hangs, signals, and the log of the first rank."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from launcher.supervise.attempt import Outcome
from launcher.supervise.hangs import Wakefulness, find_hang
from launcher.supervise.launches import POLL_SECONDS, Launch
from launcher.supervise.signals import Signals
from trainers.rank.protocol import AttemptFiles, StopNote, read_notes

GRACE_SECONDS = 3.0  # for the other ranks to say what they saw, after one failed


class Elsewhere(Protocol):
    """How the attempt ended on another machine, where this one must end too."""

    @property
    def stopped(self) -> int:
        """The signal that ended it, or 0."""


def nowhere() -> None:
    """A run of one machine."""


@dataclass
class Watcher:
    """What is looked at while an attempt runs."""

    files: AttemptFiles
    beats: Path
    hang_timeout: float | None
    shown: int  # the rank whose log goes to the terminal
    signals: Signals
    elsewhere: Callable[[], Elsewhere | None] = nowhere

    def follow(self, launch: Launch) -> Outcome:
        """Watches the ranks until all are gone."""
        deadline = float("inf")
        exits: dict[int, int] = {}
        hang, cut, awake = None, False, Wakefulness()
        with _Tail(self.files.rank(self.shown).log) as tail:
            while (code := launch.wait(POLL_SECONDS)) is None:
                tail.show()
                now, since = time.monotonic(), awake.look()
                if now < deadline:
                    exits = launch.exits()
                    if -signal.SIGKILL in exits.values():
                        deadline = now  # nothing that the others may say is the cause
                    elif any(exits.values()):
                        deadline = min(deadline, now + GRACE_SECONDS)
                if (other := self.elsewhere()) is not None:
                    cut = True
                    self.signals.received = self.signals.received or other.stopped or None
                if self._stopped_early() or cut:
                    # Another rank may wait in C++ for what this one was to send, and hear of no signal there.
                    deadline = min(deadline, now + GRACE_SECONDS)
                self.signals.pass_on(launch.ranks())
                if hang is None and now < deadline:
                    hang = find_hang(self.beats, launch.ranks(), self.hang_timeout, self.files, since)
                if hang is not None or self.signals.twice or now >= deadline:
                    launch.kill()
            tail.show()
        if hang is None and not self.signals.twice and time.monotonic() < deadline:
            exits = launch.exits()
        return Outcome(self.files, code, exits, hang, cut)

    def _stopped_early(self) -> bool:
        """Whether a rank stopped before the ranks could agree on it, with nothing to save.

        The signal may have come to that rank alone: it is then passed to the others, as if it were ours.
        """
        early = False
        for note in read_notes(self.files.folder, StopNote):
            self.signals.received = self.signals.received or note.signal
            early = early or not note.saved
        return early


class _Tail:
    """Copies what is new in a log to the terminal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream: BinaryIO | None = None

    def __enter__(self) -> _Tail:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def show(self) -> None:
        if self.stream is None and self.path.exists():
            self.stream = self.path.open("rb")
        if self.stream is not None and (chunk := self.stream.read()):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
