"""Heartbeats: each rank says how far it is, in a small file of its machine that the launcher watches.

    PHALANX_BEATS/rank-N     64 bytes: time, beats, step, median seconds a step, phase

The time is CLOCK_MONOTONIC, which all processes of a machine share and no change of the clock moves. In the
steps of training and evaluation the main thread beats, so a rank that waits for ever is noticed. In phases
that have no steps (loading, the first step, saving) a thread beats: it tells a rank that is stopped, or whose
interpreter is held, from one that works.
"""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.rank.protocol import BEATS

STEP = "step"  # the phase in which each step beats
PERIOD = 0.5  # seconds between the beats of the thread
_LAYOUT = struct.Struct("<dqqd32s")


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life; time is CLOCK_MONOTONIC, step_seconds 0 before a second step."""

    time: float
    count: int
    step: int
    step_seconds: float
    phase: str


def beat_file(folder: Path, rank: int) -> Path:
    """Return where a rank writes its heartbeats."""
    return folder / f"rank-{rank}"


def read_beat(path: Path) -> Beat | None:
    """What a rank wrote last; None before its first beat."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _LAYOUT.size:
        return None
    when, count, step, seconds, phase = _LAYOUT.unpack_from(raw)
    return Beat(when, count, step, seconds, phase.rstrip(b"\0").decode()) if count else None


class Heart:
    """Writes the beats of this rank; does nothing where no launcher watches."""

    def __init__(self) -> None:
        self.file: mmap.mmap | None = None
        self.phase = "start"
        self.count = self.step = 0
        self.ended = 0.0  # when the last step ended
        self.recent: deque[float] = deque(maxlen=50)  # seconds of the last steps
        self.lock = threading.Lock()
        self.steady = threading.Event()  # set: the thread beats

    def start(self, rank: int) -> None:
        """Begins in the phase "start"."""
        folder = os.environ.get(BEATS)
        if folder is None or self.file is not None:
            return
        with beat_file(Path(folder), rank).open("w+b") as file:
            file.truncate(_LAYOUT.size)
            self.file = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.enter("start")
        threading.Thread(target=self._beat_steadily, name="heartbeat", daemon=True).start()

    def beat(self, progress: bool = True) -> None:
        """A sign of life; `progress`: of the main thread, so that the count says how far the rank is."""
        if self.file is None:
            return
        with self.lock:
            self.count += progress
            median = statistics.median(self.recent) if len(self.recent) > 1 else 0.0
            _LAYOUT.pack_into(
                self.file, 0, time.monotonic(), self.count, self.step, median, self.phase.encode()[:32]
            )

    def enter(self, phase: str) -> None:
        """Changes the phase; in STEP the main thread must beat, in others the thread does."""
        self.phase = phase
        if phase == STEP:
            self.steady.clear()
        else:
            self.ended = 0.0  # what lies between two steps is no step
            self.steady.set()
        self.beat()

    def stepped(self, step: int) -> None:
        """An optimiser step ended."""
        now = time.monotonic()
        if self.ended:
            self.recent.append(now - self.ended)
        self.step = step
        self.enter(STEP)
        self.ended = now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def _beat_steadily(self) -> None:
        while True:
            self.steady.wait()
            self.beat(progress=False)
            time.sleep(PERIOD)


heart = Heart()
