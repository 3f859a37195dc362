"""Watch the heartbeats of this machine's ranks, and find the rank that hangs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.rank.heartbeat import Heartbeat, heartbeat_file, read_heartbeat
from trainers.rank.protocol import AttemptFiles
from trainers.rank.signals import STACK_SIGNAL

SHORTEST = 60.0  # seconds; the default timeout is at least this
STEPS = 10  # the default timeout in median steps
# Seconds between two looks after which this process was suspended. Looks are some tenths of a second apart,
# and a busy machine does not delay them that long.
ASLEEP = 20.0
STACK_SECONDS = 2.0  # time for a rank to write its stack
_PREFIX = "phalanx-heartbeats-"
# The innermost frames of a rank that waits for other ranks: it does not hang itself.
_WAITING = re.compile(
    r"torch/distributed/|torch/autograd/|torch/_tensor\.py|agreement\.py|deepspeed/comm/|"
    r'torch/nn/parallel/distributed\.py", line \d+ in _(sync|distributed)_'  # not DDP around a forward
)


@dataclass(frozen=True)
class Hang:
    """A rank without heartbeats: for how long, its last one, and its Python stack (innermost frame first)."""

    rank: int
    seconds: float
    beat: Heartbeat
    stopped: bool  # by SIGSTOP or a debugger
    stack: str

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, so that a rank of another machine may be the one that hangs."""
        return not self.stopped and _waits(self.stack)

    @property
    def reason(self) -> str:
        state = "stopped (SIGSTOP, or a debugger)" if self.stopped else "hung"
        at = f"in phase '{self.beat.phase}' after step {self.beat.step}"
        return f"{state}: no heartbeat for {self.seconds:.0f} s, {at}"


def make_heartbeat_folder() -> Path:
    """Create a folder on this machine for the heartbeats, and remove those of launchers that were killed."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


class SuspensionDetector:
    """The time since which this process has looked without a long pause.

    If a job is suspended (preemption, `scontrol suspend`, a closed laptop), all its processes stop, but the
    clock continues.
    """

    def __init__(self) -> None:
        self.since = self.last = time.monotonic()

    def look(self) -> float:
        """Record a look, and return since when there was no pause (as time.monotonic()). Call it often."""
        now = time.monotonic()
        if now - self.last > ASLEEP:
            self.since = now
        self.last = now
        return self.since


def find_hang(
    heartbeats: Path, ranks: Mapping[int, int], timeout: float | None, files: AttemptFiles, awake: float = 0.0
) -> Hang | None:
    """Return the rank that hangs, if a rank has sent no heartbeat for `timeout` seconds; else None.

    `ranks` is rank -> pid. The other ranks wait for the one that hangs, and soon send no heartbeats either.
    The one that hangs is stopped; else it is at the earliest step; else its stack does not wait for others;
    else it has sent the fewest heartbeats. Time before `awake` does not count: the ranks were suspended.
    """
    now = time.monotonic()
    last = {
        rank: beat for rank in ranks if (beat := read_heartbeat(heartbeat_file(heartbeats, rank))) is not None
    }
    silent = {rank: now - max(beat.time, awake) for rank, beat in last.items()}
    suspects = [rank for rank, beat in last.items() if silent[rank] > limit(beat, timeout)]
    if not suspects:
        return None
    stopped = {rank: _is_stopped(ranks[rank]) for rank in last}
    suspects += [rank for rank in last if stopped[rank] and rank not in suspects]
    stacks = _stacks(ranks, files)
    if all(_waits(stacks.get(rank, "")) for rank in suspects):
        # The rank for which they wait sent its last heartbeat a moment later, so its time is not up yet.
        suspects += [rank for rank, beat in last.items() if 2 * silent[rank] > limit(beat, timeout)]
    rank = min(
        suspects,
        key=lambda r: (
            not stopped[r],
            last[r].step,
            _waits(stacks.get(r, "")),
            last[r].count,
            last[r].time,
        ),
    )
    return Hang(rank, silent[rank], last[rank], stopped[rank], stacks.get(rank, ""))


def limit(beat: Heartbeat, timeout: float | None) -> float:
    """Return how many seconds a rank may send no heartbeat."""
    if timeout == 0:
        return float("inf")
    return timeout if timeout is not None else max(SHORTEST, STEPS * beat.step_seconds)


def _is_stopped(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(") ")[2][:1] in ("T", "t")


def _stacks(ranks: Mapping[int, int], attempt: AttemptFiles) -> dict[int, str]:
    """Return the Python stack of each rank, which faulthandler writes inside the rank.

    A stopped rank is continued, so that it can write its stack.
    """
    files = {rank: attempt.rank(rank).stack for rank in ranks}
    for pid in ranks.values():
        for number in (STACK_SIGNAL, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    end = time.monotonic() + STACK_SECONDS
    before: list[str] = []
    while time.monotonic() < end:
        time.sleep(0.1)
        now = [_text(file) for file in files.values()]
        if now == before and all("Current thread" in text for text in now):
            break  # each is complete: the main thread, which took the signal, comes last
        before = now
    return {rank: _text(file) for rank, file in files.items()}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _waits(stack: str) -> bool:
    """Whether the main thread, which took the signal, waits for other ranks."""
    main = stack.partition("Current thread")[2].split("\n\n")[0]
    return bool(_WAITING.search("\n".join(main.splitlines()[:8])))
