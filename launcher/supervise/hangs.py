"""Watches the heartbeats of this machine's ranks, and names the one that hangs."""

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

from trainers.rank.heartbeat import Beat, beat_file, read_beat
from trainers.rank.protocol import AttemptFiles
from trainers.rank.signals import STACK_SIGNAL

SHORTEST = 60.0  # seconds; the default timeout is never below
STEPS = 10  # median steps without a beat
ASLEEP = 20.0  # between two looks, some tenths of a second apart: longer than a busy machine takes
STACK_SECONDS = 2.0  # how long a rank has to write its stack
_PREFIX = "phalanx-beats-"
# Where a rank waits for others: the innermost frames of one that does not hang itself.
_WAITING = re.compile(
    r"torch/distributed/|torch/autograd/|torch/_tensor\.py|agreement\.py|deepspeed/comm/|"
    r'torch/nn/parallel/distributed\.py", line \d+ in _(sync|distributed)_'  # not DDP around a forward
)


@dataclass(frozen=True)
class Hang:
    """A rank without a sign of life: how long, where it was, and its Python stack (innermost frame first)."""

    rank: int
    seconds: float
    beat: Beat
    stopped: bool  # by SIGSTOP or a debugger
    stack: str

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, so that one of another machine may be the one that hangs."""
        return not self.stopped and _waits(self.stack)

    @property
    def reason(self) -> str:
        state = "stopped (SIGSTOP, or a debugger)" if self.stopped else "hung"
        at = f"in phase '{self.beat.phase}' after step {self.beat.step}"
        return f"{state}: no sign of life for {self.seconds:.0f} s, {at}"


def make_beats_folder() -> Path:
    """A folder on this machine for the beats; those of launchers that were killed are removed."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


class Wakefulness:
    """Since when this process looks, without a pause in which it could not.

    A job is suspended as a whole (preemption, `scontrol suspend`, a laptop's lid), and its clock goes on.
    """

    def __init__(self) -> None:
        self.since = self.last = time.monotonic()

    def look(self) -> float:
        """Call it often; returns since when, as time.monotonic() gives it."""
        now = time.monotonic()
        if now - self.last > ASLEEP:
            self.since = now
        self.last = now
        return self.since


def find_hang(
    beats: Path, ranks: Mapping[int, int], timeout: float | None, files: AttemptFiles, awake: float = 0.0
) -> Hang | None:
    """The rank that hangs, if one has not beaten for `timeout` seconds; `ranks` is rank -> pid.

    The others wait for it and soon do not beat either. It is the one that is stopped, else the one at the
    earliest step, else the one whose stack does not wait for others, else the one with the fewest beats.
    What was before `awake` does not count: nobody ran then.
    """
    now = time.monotonic()
    last = {rank: beat for rank in ranks if (beat := read_beat(beat_file(beats, rank))) is not None}
    silent = {rank: now - max(beat.time, awake) for rank, beat in last.items()}
    suspects = [rank for rank, beat in last.items() if silent[rank] > limit(beat, timeout)]
    if not suspects:
        return None
    stopped = {rank: _is_stopped(ranks[rank]) for rank in last}
    suspects += [rank for rank in last if stopped[rank] and rank not in suspects]
    stacks = _stacks(ranks, files)
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


def limit(beat: Beat, timeout: float | None) -> float:
    """Seconds that a rank may be silent."""
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
    """The Python stacks, written by faulthandler inside each rank; a stopped one goes on to do so."""
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
            break  # each is whole: the main thread's part, which took the signal, comes last
        before = now
    return {rank: _text(file) for rank, file in files.items()}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _waits(stack: str) -> bool:
    """Whether the main thread waits for other ranks: it is the one that took the signal."""
    main = stack.partition("Current thread")[2].split("\n\n")[0]
    return bool(_WAITING.search("\n".join(main.splitlines()[:8])))
