"""The two ways to start ranks: `accelerate launch`, and forks of a warm parent."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from launcher.plan.command import ELASTIC
from launcher.supervise.warm_parent import WarmParent
from trainers.config.errors import ConfigError
from trainers.rank import no_links
from trainers.rank.outliving import die_with_parent
from trainers.rank.proc_stat import watch
from trainers.rank.process import kill_session
from trainers.rank.protocol import AttemptFiles, run_of

POLL_SECONDS = 0.1
# torchrun's summary: "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 4711)"
_SUMMARY = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")


class Launch(Protocol):
    """Ranks that were started in one of the two ways."""

    def ranks(self) -> dict[int, int]:
        """Return the ranks of this machine that are known to run: rank -> pid."""

    def wait(self, seconds: float) -> int | None:
        """Wait at most so many seconds. Return the launch's exit code if all ranks have ended, else None."""

    def exits(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have ended; negative if a signal killed the rank."""

    def kill(self) -> None:
        """Send SIGKILL to every rank. A stopped rank would not react to SIGTERM."""


class AccelerateLaunch:
    """Ranks started by `accelerate launch`, which is their parent process."""

    def __init__(self, argv: list[str], environ: Mapping[str, str], files: AttemptFiles) -> None:
        self.files = files
        self.killed: set[int] = set()  # ranks that this launcher has killed
        with no_links.open_file(run_of(files.folder), files.launcher_log, "wb") as log:
            self.process = subprocess.Popen(
                argv,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the ranks only once, through the launcher
                preexec_fn=die_with_parent,  # if the launcher is killed, accelerate and the ranks die too
            )

    def ranks(self) -> dict[int, int]:
        return {rank: pid for rank, pid in self.files.pids().items() if self._is_rank(pid)}

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self._kill_waiting_ranks()
        if self.process.returncode is not None:
            self.kill()  # leave no process behind
            with contextlib.suppress(OSError, ConfigError):  # a file server may keep a file for a while
                no_links.remove(run_of(self.files.folder), self.files.folder / ELASTIC)
        return self.process.returncode

    def _kill_waiting_ranks(self) -> None:
        """Send SIGKILL to the other ranks when one died without a note.

        torchrun would send them SIGTERM, and give those that wait for the dead rank 30 s.
        """
        alive = self.ranks()
        gone = self.files.pids().keys() - alive.keys()
        if any(not self.files.rank(rank).ended_by_itself for rank in gone):
            for rank, pid in alive.items():
                self.killed.add(rank)
                _kill(pid)

    def exits(self) -> dict[int, int]:
        """Return the exit codes in torchrun's summary, which exists once torchrun has ended.

        torchrun itself ends the other ranks with SIGTERM, so these are left out.
        """
        if self.process.returncode is None:
            return {}
        text = self.files.launcher_log.read_text(encoding="utf-8", errors="replace")
        codes = {int(rank): int(code) for rank, code in _SUMMARY.findall(text)}
        ours = {rank for rank, code in codes.items() if -code in (signal.SIGTERM, signal.SIGINT)}
        return {rank: code for rank, code in codes.items() if rank not in ours | self.killed}

    def kill(self) -> None:
        if self.process.returncode is None:
            _kill(self.process.pid)
        kill_session(self.process.pid)
        for pid in self.ranks().values():
            _kill(pid)
            kill_session(pid)
        while self.ranks():
            time.sleep(POLL_SECONDS)  # the next attempt needs their memory

    def _is_rank(self, pid: int) -> bool:
        """Whether a pid is still a rank of this launch, and not a new process with the same pid."""
        try:
            return str(self.files.config).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False


class WarmLaunch:
    """Ranks that a warm parent has forked."""

    def __init__(
        self, parent: WarmParent, argv: list[str], environ: Mapping[str, str], not_needed: Callable[[], bool]
    ) -> None:
        self.parent = parent
        self.pids = parent.start(argv, environ, not_needed)
        self.codes: dict[int, int] = {}
        self.watched = [found for pid in self.pids.values() if (found := watch(pid)) is not None]

    def ranks(self) -> dict[int, int]:
        return {rank: pid for rank, pid in self.pids.items() if rank not in self.codes}

    def wait(self, seconds: float) -> int | None:
        for answer in self.parent.answers(seconds):
            rank = answer["exited"]["rank"]
            self.codes[rank] = answer["exited"]["code"]
            kill_session(self.pids[rank])  # what it started
        reported = len(self.codes) == len(self.pids)
        if not reported and not self.parent.ended:
            return None
        self.kill()  # after the end of their parent; the kernel does it too
        while self.watched:
            descriptor = self.watched.pop()
            select.select([descriptor], [], [])  # the next attempt needs their memory
            os.close(descriptor)
        return next((code for code in self.codes.values() if code), 0) if reported else -signal.SIGKILL

    def exits(self) -> dict[int, int]:
        return dict(self.codes)

    def kill(self) -> None:
        for pid in self.ranks().values():
            _kill(pid)
            kill_session(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
