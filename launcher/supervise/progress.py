"""Whether the ranks work: what they and the processes that they have started compute, read and write.

A rank in a library, such as one that loads, compiles or saves, sends no heartbeat of its main thread. If it
works, it uses processor time, or it reads or writes. A rank that waits does neither, or nearly: some threads
of libraries wake up now and then. So work counts from a rate on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainers.rank.proc_stat import ProcessStat, pids, read_stat

INTERVAL = 5.0  # seconds between two looks; work is measured over this time
CPU_SHARE = 0.05  # of a processor. The threads of a rank that waits take a tenth of it
BYTES_PER_SECOND = 64 * 1024  # less than the slowest disk; a tracker's process logs a tenth of it
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # seconds


@dataclass(frozen=True)
class Work:
    """What a rank and its processes have done since they started."""

    cpu: float = 0.0  # seconds
    moved: int = 0  # bytes read and written
    written: int = 0  # bytes

    def is_more_than(self, before: Work, seconds: float) -> bool:
        """Whether this is more than what a rank does that waits for so many seconds."""
        return (
            self.cpu - before.cpu >= CPU_SHARE * seconds
            or self.moved - before.moved >= BYTES_PER_SECOND * seconds
        )


@dataclass
class Progress:
    """When each rank of this machine last worked. Call look() often; it measures once in an interval."""

    interval: float = INTERVAL
    looked: float = float("-inf")
    worked: dict[int, float] = field(default_factory=dict)  # rank -> as time.monotonic()
    last: dict[int, Work] = field(default_factory=dict)
    phases: dict[int, tuple[str, int]] = field(default_factory=dict)  # rank -> phase, bytes before it

    def look(self, ranks: Mapping[int, int], phases: Mapping[int, str]) -> None:
        """Measure the work of the ranks (rank -> pid), which are in these phases, since the last look."""
        now = time.monotonic()
        if now - self.looked < self.interval:
            return
        for rank, work in works_of(ranks).items():
            before = self.last.get(rank)
            if before is None or work.is_more_than(before, now - self.looked):
                self.worked[rank] = now
            self.last[rank] = work
            phase = phases.get(rank, "")
            if rank not in self.phases or self.phases[rank][0] != phase:
                self.phases[rank] = phase, work.written
        self.looked = now

    def idle(self, pid: int) -> float:
        """Return for how many seconds a process that is no rank has not worked. Call it often."""
        self.look({0: pid}, {})
        return time.monotonic() - self.worked.get(0, time.monotonic())

    def written(self, rank: int) -> int:
        """Return how many bytes a rank has written in its phase."""
        before = self.phases[rank][1] if rank in self.phases else 0
        return max(0, self.last.get(rank, Work()).written - before)


def works_of(ranks: Mapping[int, int]) -> dict[int, Work]:
    """Return the work of each rank (rank -> pid) with the processes that it has started.

    They are its descendants, and all processes of its session: a compiler whose parent has ended, for
    instance.
    """
    stats = {}
    for pid in pids():
        with contextlib.suppress(OSError):  # it has ended
            stats[pid] = read_stat(pid)
    found = {}
    for rank, leader in ranks.items():
        if leader in stats:
            members = [pid for pid in stats if _belongs(pid, leader, stats)]
            moved, written = (sum(numbers) for numbers in zip(*map(_bytes, members), strict=True))
            found[rank] = Work(_TICK * sum(stats[pid].cpu for pid in members), moved, written)
    return found


def _belongs(pid: int, leader: int, stats: Mapping[int, ProcessStat]) -> bool:
    if stats[pid].session == leader:
        return True
    seen = 0
    while pid in stats and pid != leader and seen < len(stats):
        pid, seen = stats[pid].parent, seen + 1  # `seen`: a pid may be used again while the list is read
    return pid == leader


def _bytes(pid: int) -> tuple[int, int]:
    """Return how many bytes a process has read and written, and written.

    Returns (0, 0) if it has ended, or is another user's. rchar has what comes from the page cache, read_bytes
    what is mapped, so both count.
    """
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    written = values["wchar"] + values["write_bytes"]
    return values["rchar"] + values["read_bytes"] + written, written
