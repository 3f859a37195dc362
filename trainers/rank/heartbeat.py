"""Heartbeats: each rank writes its progress to a small file on its machine, which the launcher watches.

    PHALANX_HEARTBEATS/rank-N     72 bytes: time, count, step, median seconds of a step, phase, progress

The time is CLOCK_MONOTONIC: all processes of a machine share it, and setting the clock does not change it.
The count and the time "progress" have only the heartbeats of the main thread.

In the phase "step" (training steps, and the batches of an evaluation) the main thread sends the heartbeats.
So the launcher notices a rank that waits forever. In the other phases a second thread sends them too: start
(until the end of the first step), load, save, end, and an evaluation before its first batch. They prove that
the rank lives (it is not stopped by SIGSTOP or a debugger, and its Python interpreter is not blocked), not
that it makes progress: the main thread may be in a library for long. So in these phases the launcher also
looks at what the rank computes, reads and writes (launcher/supervise/hangs.py).
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

from trainers.rank.protocol import HEARTBEATS

STEP = "step"  # the phase in which only the main thread sends heartbeats
PERIOD = 0.5  # seconds between the heartbeats of the thread
_LAYOUT = struct.Struct("<dqqd32sd")


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank.

    `time` and `progress` are CLOCK_MONOTONIC; `progress` is the time of the main thread's last heartbeat.
    `step_seconds` is 0 until the durations of two steps are known.
    """

    time: float
    count: int
    step: int
    step_seconds: float
    phase: str
    progress: float = 0.0


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Return the file of a rank's heartbeats."""
    return folder / f"rank-{rank}"


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Return the last heartbeat of a rank, or None before its first one."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _LAYOUT.size:
        return None
    when, count, step, seconds, phase, progress = _LAYOUT.unpack_from(raw)
    return Heartbeat(when, count, step, seconds, phase.rstrip(b"\0").decode(), progress) if count else None


class Heart:
    """The heartbeats of this rank. Without a launcher, its methods write nothing."""

    def __init__(self) -> None:
        self.file: mmap.mmap | None = None
        self.phase = "start"
        self.count = self.step = 0
        self.progressed = 0.0  # when the main thread sent its last heartbeat
        self.ended = 0.0  # when the last step ended
        self.recent: deque[float] = deque(maxlen=50)  # durations of the last steps, in seconds
        self.lock = threading.Lock()
        self.steady = threading.Event()  # set: the thread sends heartbeats

    def start(self, rank: int) -> None:
        """Create the file, enter the phase "start", and start the thread."""
        folder = os.environ.get(HEARTBEATS)
        if folder is None or self.file is not None:
            return
        with heartbeat_file(Path(folder), rank).open("w+b") as file:
            file.truncate(_LAYOUT.size)
            self.file = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.enter("start")
        threading.Thread(target=self._beat_steadily, name="heartbeat", daemon=True).start()

    def beat(self, progress: bool = True) -> None:
        """Write a heartbeat. `progress`: it is the main thread's, so it counts as progress of the rank."""
        if self.file is None:
            return
        with self.lock:
            self.count += progress
            now = time.monotonic()
            self.progressed = now if progress else self.progressed
            median = statistics.median(self.recent) if len(self.recent) > 1 else 0.0
            phase = self.phase.encode()[:32]
            _LAYOUT.pack_into(self.file, 0, now, self.count, self.step, median, phase, self.progressed)

    def enter(self, phase: str) -> None:
        """Change the phase. In STEP the main thread must call beat(); in other phases the thread does it."""
        self.phase = phase
        if phase == STEP:
            self.steady.clear()
        else:
            self.ended = 0.0  # time between two steps is not part of a step
            self.steady.set()
        self.beat()

    def stepped(self, step: int) -> None:
        """Write a heartbeat at the end of an optimiser step."""
        now = time.monotonic()
        if self.ended:
            self.recent.append(now - self.ended)
        self.step = step
        self.enter(STEP)
        self.ended = now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase while the block runs, then return to the previous one."""
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
