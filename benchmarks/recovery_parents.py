"""The parts parent, launcher and kept of recovery.py: kill what starts the ranks, and wait for the next step.

The warm process is the parent of the ranks. After a kill of the launcher the same command is given again,
with --resume. `kept`: the same with a process that keeps the imports (python -m trainers.warm --keep).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from killed_run import RANKS, Side, environment, running
from measure import REPO, Failed, spread
from run_processes import members, memory_of

from trainers.rank.proc_stat import read_stat

KINDS = {
    "parent": "the warm process",
    "launcher": "the launcher, then --resume",
    "kept": "the launcher, then --resume; imports kept",
}
GOAL = 8.0  # seconds until a step ends
AFTER_STEPS = 6  # the most steps between two kills
KEPT_SECONDS = 120.0  # for the imports of the process that is kept


@dataclass(frozen=True)
class Turn:
    first_steps: list[float | None]  # seconds from each kill; None: no step followed
    spare: tuple[int, int] | None  # bytes of a warm process without ranks: PSS, and those that only it has


class Parents:
    """Runs (ddp) whose warm process or launcher is killed."""

    def __init__(self, work: Path, model: Path, save_steps: int, seed: int) -> None:
        self.work, self.model, self.save_steps, self.seed = work, model, save_steps, seed

    def turn(self, kind: str, number: int, kills: int) -> Turn:
        draw, found = random.Random(f"{self.seed} parents {number}"), []
        with (
            self._kept(kind, number) as environ,
            running("warm", self.work, self.model, self.save_steps, environ=environ) as side,
        ):
            side.wait(steps=1)
            if kind == "kept" and any(map(is_warm, members(side.mark))):
                raise Failed("the run imported the libraries itself")
            memory = spare_memory(side) if kind != "kept" else None
            for _ in range(kills):
                steps, pause = draw.randint(2, AFTER_STEPS), draw.random()
                side.wait(steps=steps)
                side.wait(time.monotonic() + pause)
                found.append(
                    side.kill_process(side.warm_process()) if kind == "parent" else side.kill_launcher()
                )
        return Turn(found, memory)

    @contextmanager
    def _kept(self, kind: str, number: int) -> Iterator[dict[str, str]]:
        """Start a process that keeps the imports, if this kind has one. Yields the variable that names it."""
        if kind != "kept":
            yield {}
            return
        path = self.work / f"kept-{number}.socket"
        argv = [sys.executable, "-m", "trainers.warm", "--keep", str(path), "trainers.sft"]
        with subprocess.Popen(argv, cwd=REPO, env=os.environ | environment(self.work)) as process:
            try:
                end = time.monotonic() + KEPT_SECONDS
                while not path.exists():
                    if process.poll() is not None or time.monotonic() > end:
                        raise Failed("the process that keeps the imports does not listen")
                    time.sleep(0.1)
                yield {"PHALANX_WARM": str(path)}
            finally:
                process.kill()


def is_warm(pid: int) -> bool:
    """Return whether a process has the command line of a warm process, as its forks have too."""
    with suppress(OSError):
        return b"trainers.warm" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def spare_memory(side: Side) -> tuple[int, int] | None:
    """Return the memory of a warm process that has no ranks: its PSS, and what only it has, in bytes."""
    busy = {side.warm_process(), *(side.pid(rank) for rank in range(RANKS))}
    for pid in filter(is_warm, members(side.mark)):
        with suppress(OSError):  # it has ended
            if not {pid, read_stat(pid).session} & busy:  # its data workers have the session of a rank
                return memory_of(pid)
    return None


HEAD = ["killed", "recovered", "first step after", "a spare has (PSS)", "and shares with nobody", "goal"]


def row(kind: str, turns: Sequence[Turn]) -> list[str]:
    """Return a row of the table. The goal is met only if the worst kill meets it."""
    kills = [seconds for turn in turns for seconds in turn.first_steps]
    back = [seconds for seconds in kills if seconds is not None]
    spares = [turn.spare for turn in turns if turn.spare is not None]
    sizes = [
        f"{spread([spare[part] / 2**20 for spare in spares])} MiB" if spares else "no spare"
        for part in (0, 1)
    ]
    met = len(back) == len(kills) and max(back) <= GOAL
    first = f"{spread(back, '.2f')} s" if back else "never"
    return [
        KINDS[kind],
        f"{len(back)} of {len(kills)}",
        first,
        *sizes,
        f"{GOAL:g} s: {'met' if met else 'MISSED'}",
    ]
