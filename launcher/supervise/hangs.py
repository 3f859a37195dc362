"""Watch the heartbeats and the work of this machine's ranks, and find the rank that hangs.

In a step a rank hangs if its main thread sends no heartbeat. In the other phases (start, load, save, end ...)
the main thread may be in a library for long. There a rank hangs if it sends no heartbeat and does not work
either: no processor time, nothing read or written (progress.py).
"""

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

from launcher.supervise.progress import INTERVAL, Progress
from trainers.rank.heartbeat import STEP, Heartbeat, heartbeat_file, read_heartbeat
from trainers.rank.proc_stat import read_stat
from trainers.rank.protocol import AttemptFiles
from trainers.rank.signals import STACK_SIGNAL

SHORTEST = 60.0  # seconds; the default timeout is at least this
STEPS = 10  # the default timeout in median steps
# The default for a rank that does not work in another phase. A file server that restarts, or a service that
# checks an upload, may let it wait for minutes.
IDLE = 600.0  # seconds
SLOW_DISK = 20e6  # bytes per second: what a rank has written may still be on the way to the disk
# Seconds between two looks after which this process was suspended. Looks are some tenths of a second apart
# (at most STACK_SECONDS), and a busy machine does not delay them that long. With a short hang_timeout, half
# of it.
ASLEEP, SHORTEST_SLEEP = 20.0, 3.0
STACK_SECONDS = 2.0  # time for a rank to write its stack
_PREFIX = "phalanx-heartbeats-"
# The innermost frames of a rank that waits for other ranks: it does not hang itself.
_WAITING = re.compile(
    r"torch/distributed/|torch/autograd/|torch/_tensor\.py|agreement\.py|deepspeed/comm/|"
    r"torch/utils/file_baton\.py|"
    r'torch/nn/parallel/distributed\.py", line \d+ in _(sync|distributed)_'  # not DDP around a forward
)

# It waits for a lock that the kernel frees when its holder ends. The holder may be another program.
_LOCKED = re.compile(r"/filelock/")


@dataclass(frozen=True)
class Hang:
    """A rank without heartbeats: for how long, its last one, and its Python stack (innermost frame first)."""

    rank: int
    seconds: float
    beat: Heartbeat
    stopped: bool  # by SIGSTOP or a debugger
    stack: str
    idle: bool = False  # it sends heartbeats, but does not work

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, so that a rank of another machine may be the one that hangs."""
        return not self.stopped and _waits(self.stack)

    @property
    def reason(self) -> str:
        state = "stopped (SIGSTOP, or a debugger)" if self.stopped else "hung"
        at = f"in phase '{self.beat.phase}' after step {self.beat.step}"
        if self.idle:
            work = "it computed, read and wrote almost nothing"
            return f"{state}: no progress for {self.seconds:.0f} s ({work}), {at}"
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

    def __init__(self, hang_timeout: float | None = None) -> None:
        self.asleep = max(min(ASLEEP, (hang_timeout or ASLEEP * 2) / 2), SHORTEST_SLEEP)
        self.since = self.last = time.monotonic()

    def look(self) -> float:
        """Record a look, and return since when there was no pause (as time.monotonic()). Call it often."""
        now = time.monotonic()
        if now - self.last > self.asleep:
            self.since = now
        self.last = now
        return self.since


@dataclass
class HangFinder:
    """A search for the rank of this machine that hangs, in one attempt."""

    heartbeats: Path
    timeout: float | None  # launch.hang_timeout
    files: AttemptFiles
    alone: bool = True  # no other machine has ranks

    def __post_init__(self) -> None:
        self.progress = Progress(INTERVAL if not self.timeout else min(INTERVAL, self.timeout / 4))
        self.asked = float("-inf")  # when idle ranks were last asked for their stacks

    def find(self, ranks: Mapping[int, int], awake: float = 0.0) -> Hang | None:
        """Return the rank that hangs, or None. `ranks` is rank -> pid.

        The other ranks wait for the one that hangs, and soon send no heartbeats either. The one that hangs is
        stopped; else it is at the earliest step; else its stack does not wait for others; else it has sent
        the fewest heartbeats. Time before `awake` does not count: the ranks were suspended.
        """
        last = {
            rank: beat
            for rank in ranks
            if (beat := read_heartbeat(heartbeat_file(self.heartbeats, rank))) is not None
        }
        self.progress.look(
            {rank: ranks[rank] for rank in last}, {rank: beat.phase for rank, beat in last.items()}
        )
        now = time.monotonic()
        silent = {rank: now - max(beat.time, self._worked(rank, beat), awake) for rank, beat in last.items()}
        suspects = [rank for rank, beat in last.items() if silent[rank] > limit(beat, self.timeout)]
        if not suspects:
            return self._find_idle(last, ranks, awake, now)
        stopped = {rank: _is_stopped(ranks[rank]) for rank in last}
        suspects += [rank for rank in last if stopped[rank] and rank not in suspects]
        stacks = _stacks(ranks, self.files)
        if all(_waits(stacks.get(rank, "")) for rank in suspects):
            # The rank for which they wait sent its last heartbeat a moment later, so its time is not up yet.
            suspects += [rank for rank, beat in last.items() if 2 * silent[rank] > limit(beat, self.timeout)]
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

    def _worked(self, rank: int, beat: Heartbeat) -> float:
        """Return when a rank last worked, in a phase in which work counts."""
        return self.progress.worked.get(rank, 0.0) if beat.phase != STEP else 0.0

    def _find_idle(
        self, last: Mapping[int, Heartbeat], ranks: Mapping[int, int], awake: float, now: float
    ) -> Hang | None:
        """Return a rank that does not work. One that waits for others is not it while they work."""
        idle = {}
        for rank, beat in last.items():
            if beat.phase == STEP:
                continue
            seconds = now - max(beat.progress, self._worked(rank, beat), awake)
            if seconds > idle_limit(self.progress.written(rank), self.timeout):
                idle[rank] = seconds
        if not idle or now - self.asked < self.progress.interval:
            return None
        self.asked = now
        stopped = {rank for rank in idle if _is_stopped(ranks[rank])}  # before _stacks() continues them
        stacks = _stacks({rank: ranks[rank] for rank in idle}, self.files)
        if not stopped and any(_LOCKED.search(_innermost(stack)) for stack in stacks.values()):
            return None
        waiting = {rank for rank in idle if _waits(stacks[rank])} - stopped
        # All ranks of a job may wait for each other. But on several machines, another may still work.
        stuck = idle.keys() - waiting or (idle.keys() if self.alone and len(idle) == len(ranks) else set())
        if not stuck:
            return None
        rank = min(stuck, key=lambda r: (r not in stopped, last[r].step, last[r].count, last[r].progress))
        return Hang(rank, idle[rank], last[rank], rank in stopped, stacks[rank], idle=True)


def limit(beat: Heartbeat, timeout: float | None) -> float:
    """Return how many seconds a rank may send no heartbeat."""
    if timeout == 0:
        return float("inf")
    return timeout if timeout is not None else max(SHORTEST, STEPS * beat.step_seconds)


def idle_limit(written: int, timeout: float | None) -> float:
    """Return how many seconds a rank may not work, outside steps. `written`: its bytes in this phase.

    The system may write them to the disk only at the end, while the rank waits.
    """
    if timeout == 0:
        return float("inf")
    return timeout if timeout is not None else IDLE + written / SLOW_DISK


def _is_stopped(pid: int) -> bool:
    try:
        return read_stat(pid).state in ("T", "t")
    except OSError:
        return False


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
    """Whether the main thread waits for other ranks."""
    return bool(_WAITING.search(_innermost(stack)))


def _innermost(stack: str) -> str:
    """Return the innermost frames of the main thread, which took the signal."""
    main = stack.partition("Current thread")[2].split("\n\n")[0]
    return "\n".join(main.splitlines()[:8])
