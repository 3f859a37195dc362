"""Runs a config to its end: attempt after attempt, each a fresh launch, until one succeeds or none can.

A failure that a fresh launch can mend is followed by another attempt, from the newest checkpoint that
verifies. Three in a row that came no further end the run, and so does at once what would only fail again.
With auto_find_batch_size an attempt that ran out of memory is followed by one with a smaller batch_size.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import IO

from launcher import attempt
from launcher.attempt import AccelerateLaunch, Outcome, Signals, WarmLaunch, Watcher
from launcher.backend import Backend
from launcher.batch_search import advice, announce, with_smaller_batch
from launcher.batons import extensions_cache, remove_left_locks
from launcher.command import build_environment, launch_arguments
from launcher.config import Run
from launcher.diagnosis import Failure, diagnose, read_notes, report
from launcher.topology import Topology, free_port
from launcher.warm import GivenUp, Refused, WarmParent
from launcher.watch import make_beats_folder
from trainers.config import MODULES, OUT_OF_MEMORY, RUN_FAILED, SAVED
from trainers.heartbeat import FOLDER as BEATS
from trainers.manifest import newest_usable, step_of
from trainers.run_folder import LAUNCH, claim, hold, release
from trainers.settings import Value, changed

WARM_LOG = "warm.log"  # of the process that imports the libraries
WITHOUT_PROGRESS = 3  # attempts in a row that came no further
PAUSES = (0.0, 5.0)  # seconds before an attempt, after one and after two without progress


def train(run: Run, topology: Topology, backend: Backend) -> int:
    """Runs the training to its end and returns its exit code (see docs/exit-codes.md)."""
    lock = None
    if topology.machine_rank == 0:
        lock = hold(run.folder)
        claim(run.folder, run.train)
    with Signals() as signals:
        supervisor = Supervisor(run, topology, backend, signals, lock)
        try:
            return supervisor.run_to_end()
        finally:
            supervisor.close()
            release()


def first_rank(topology: Topology) -> int:
    """The lowest rank of this machine: the one whose output the terminal shows."""
    return topology.machine_rank * topology.local_processes


@dataclass
class Supervisor:
    """The attempts of one start."""

    run: Run
    topology: Topology
    backend: Backend
    signals: Signals
    lock: IO[str] | None

    def __post_init__(self) -> None:
        self.parent: WarmParent | None = None
        self.warm = self.run.launch.start == "warm"
        self.beats = make_beats_folder()
        self.began = time.time()
        self.tried: list[int] = []  # batch sizes that ran out of memory
        self.idle = 0  # attempts in a row without progress
        self.restarts = 0

    def close(self) -> None:
        if self.parent is not None:
            self.parent.close()
        shutil.rmtree(self.beats, ignore_errors=True)

    def run_to_end(self) -> int:
        while True:
            before = self._reached()
            outcome = self._attempt()
            if (code := self._stopped(outcome)) is not None:
                return code
            if outcome.code == 0:
                return 0
            failure = diagnose(outcome)
            if not self._prepare_next(failure, before):
                return self._give_up(failure, outcome)

    def _attempt(self) -> Outcome:
        """Starts the ranks once, and waits for their end."""
        if self.topology.num_machines == 1 and not self.run.launch.main_process_port:
            # A rendezvous of its own: a port that was free at the last attempt need not be now.
            self.topology = replace(self.topology, main_process_port=free_port())
        folder, argv = attempt.prepare(self.run, self.topology, self.backend)
        live = sys.stdout.isatty()
        environ = build_environment(self.run, self.topology, os.environ, folder, live)
        environ[BEATS] = str(self.beats)
        for lock in remove_left_locks(extensions_cache(environ), self.began):
            print(f"note: {lock}, which a killed process left, is removed; the ranks would wait for it.")
        for old in self.beats.iterdir():
            old.unlink()
        watcher = Watcher(
            folder, self.beats, self.run.launch.hang_timeout, first_rank(self.topology), self.signals
        )
        if self.warm:
            try:
                return watcher.follow(
                    WarmLaunch(
                        self._warm_parent(environ), launch_arguments(argv), environ, self._asked_to_stop
                    )
                )
            except GivenUp:
                return Outcome(folder, RUN_FAILED)
            except Refused as why:
                print(f"start: accelerate launch, since the ranks cannot be forked: {why}", flush=True)
                self._drop_parent()
                self.warm = False
        return watcher.follow(AccelerateLaunch(argv, environ, folder))

    def _asked_to_stop(self) -> bool:
        return self.signals.received is not None

    def _warm_parent(self, environ: Mapping[str, str]) -> WarmParent:
        """The process that forks the ranks; a new one where the last has ended."""
        if self.parent is None or self.parent.ended:
            module = f"trainers.{MODULES[self.run.train.trainer]}"
            deepspeed = self.backend.name == "deepspeed"
            log = (self.run.folder / LAUNCH / WARM_LOG).resolve()
            self.parent = WarmParent(module, deepspeed, environ, log, self.lock)
        return self.parent

    def _drop_parent(self) -> None:
        if self.parent is not None:
            self.parent.close()
        self.parent = None

    # ------------------------------------------------------------------------------------- what next

    def _stopped(self, outcome: Outcome) -> int | None:
        """The exit code where a signal ended the run; None where none did."""
        notes = read_notes(outcome.folder, "stopped")
        received = self.signals.received
        if received is None or (outcome.code == 0 and not notes):  # it came too late: the run has ended well
            return None
        name, saved = signal.Signals(received).name, next((n["saved"] for n in notes if n["saved"]), "")
        if saved:
            print(f"stopped by {name}: {saved}; `phalanx train` with --resume goes on", file=sys.stderr)
            return SAVED
        print(f"stopped by {name}; nothing was saved; logs: {outcome.folder}", file=sys.stderr)
        return 128 + received

    def _reached(self) -> int:
        """The step of the newest checkpoint."""
        return step_of(newest_usable(self.run.folder, content=False)[0])

    def _prepare_next(self, failure: Failure, before: int) -> bool:
        """Sets the next attempt up, said in a line; False where there is none."""
        if failure.of_batches:
            return self._try_smaller(failure)
        self.idle = 0 if self._reached() > before else self.idle + 1
        if not failure.mendable(self.run.launch.restart_on_nan) or self.topology.num_machines > 1:
            return False
        if self.restarts >= self.run.launch.max_restarts or self.idle >= WITHOUT_PROGRESS:
            return False
        self.restarts += 1
        self.run = self._going_on()
        begins = newest_usable(self.run.folder, content=False)[0] or "the start"
        count = f"{self.restarts} of at most {self.run.launch.max_restarts}"
        print(f"{failure.line}; restart {count}, from {begins}", file=sys.stderr, flush=True)
        self._pause(PAUSES[max(self.idle - 1, 0)])
        return not self._asked_to_stop()

    def _try_smaller(self, failure: Failure) -> bool:
        self.tried.append(self.run.train.batch_size)
        if not self.run.train.auto_find_batch_size:
            return False
        smaller = with_smaller_batch(self._going_on())
        if smaller is None:
            return False
        begins = newest_usable(self.run.folder, content=False)[0]
        print(announce(self.run, smaller, failure.rank or 0, begins), flush=True)
        self.run = smaller
        return True

    def _going_on(self) -> Run:
        """The run of an attempt that goes on from what the earlier ones wrote, where they wrote something."""
        if newest_usable(self.run.folder, content=False)[0] is None:
            return self.run
        why = "a restart"
        changes = {"resume": Value(True, why, "resume"), "overwrite": Value(False, why, "overwrite")}
        return replace(self.run, settings=changed(self.run.settings, changes))

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._asked_to_stop():
            time.sleep(attempt.POLL_SECONDS)

    def _give_up(self, failure: Failure, outcome: Outcome) -> int:
        lines = []
        if failure.code == OUT_OF_MEMORY:
            lines = advice(self.run, self.backend, self.topology, self.tried, failure.of_batches)
        elif self.idle >= WITHOUT_PROGRESS:
            lines = [f"{WITHOUT_PROGRESS} attempts in a row came no further; it is not tried again."]
        if (received := self.signals.received) is not None:
            print(f"stopped by {signal.Signals(received).name} between two attempts", file=sys.stderr)
            report(failure, outcome.folder, first_rank(self.topology), lines)
            return 128 + received
        return report(failure, outcome.folder, first_rank(self.topology), lines)
