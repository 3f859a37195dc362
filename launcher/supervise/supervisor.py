"""Run a config to its end: one attempt after another, until one succeeds or a restart cannot help.

restarts.py decides what follows a failed attempt. Several machines agree on it (machines.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config import Run
from launcher.plan.backend import Backend
from launcher.plan.batch_search import with_smaller_batch
from launcher.plan.command import build_environment, launch_arguments
from launcher.plan.memory_advice import advice
from launcher.plan.topology import Topology, free_port
from launcher.slurm import job as slurm
from launcher.slurm.journal import note, note_end, starts_without_progress
from launcher.supervise import attempt
from launcher.supervise.attempt import Outcome
from launcher.supervise.diagnosis import Failure, diagnose, report
from launcher.supervise.hangs import make_heartbeat_folder
from launcher.supervise.launches import POLL_SECONDS, AccelerateLaunch, WarmLaunch
from launcher.supervise.machine_messages import Ended, MachineLost, Order, StoppedWaiting, first_cause
from launcher.supervise.machines import Machines
from launcher.supervise.restarts import WITHOUT_PROGRESS, Restarts, resumed
from launcher.supervise.signals import Signals
from launcher.supervise.stale_locks import extensions_cache, remove_stale_locks
from launcher.supervise.warm_parent import NotNeeded, Refused, WarmParent
from launcher.supervise.watcher import Watcher
from trainers.config.errors import OUT_OF_MEMORY, PEER_LOST, RUN_FAILED, SAVED, ConfigError
from trainers.rank.protocol import HEARTBEATS, LAUNCH, WAITS, AttemptFiles, StopNote
from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.data_cache import cache_root
from trainers.storage.folder_lock import InUse, Lock, lock_folder, unlock_folder
from trainers.storage.manifest import newest_usable, step_of
from trainers.storage.run_folder import claim

WARM_LOG = "warm-{}.log"  # log of the process that imports the libraries, by machine
TAKE_SECONDS = 0.5  # `phalanx status` holds the folder's lock for a moment
RETAKE_SECONDS = 180.0  # for a requeued job: a file server may keep the lock of a lost node for a while


def train(run: Run, topology: Topology, backend: Backend, signals: Signals) -> int:
    """Run the training to its end, and return its exit code (docs/exit-codes.md)."""
    job = slurm.this_job()
    lock = _take_folder(run, job, signals) if topology.machine_rank == 0 else None
    supervisor = Supervisor(run, topology, backend, signals, lock)
    try:
        code = supervisor.run_to_end()
    finally:
        supervisor.close()
        unlock_folder()
    if job is not None and topology.machine_rank == 0:
        requeued = supervisor.requeue_job and slurm.requeue(job)
        if lock is not None and not requeued:
            note_end(run.folder, job)
    return code


def _take_folder(run: Run, job: str | None, signals: Signals) -> Lock | None:
    """Take the run's folder for this start, and return the lock on it, or None if a signal arrives first.

    Raises:
        ConfigError: the folder is not available, or the job's last starts made no progress.
    """
    restarts = slurm.restarts()
    end = time.monotonic() + (RETAKE_SECONDS if restarts else TAKE_SECONDS)
    while signals.received is None:
        try:
            lock = lock_folder(run.folder)
            break
        except InUse:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_SECONDS)
    else:
        return None
    claim(run.folder, run.train, run.config_path)
    if job is not None:
        note(run.folder, job, step_of(newest_usable(run.folder, content=False)[0]), restarts)
        if starts_without_progress(run.folder, job) >= WITHOUT_PROGRESS:
            raise ConfigError(
                f"job {job}: {WITHOUT_PROGRESS} starts in a row made no progress; it is not requeued. "
                f"The logs are in {run.folder / LAUNCH}."
            )
    return lock


def first_rank(topology: Topology) -> int:
    """Return the lowest rank of this machine. The terminal shows its output."""
    return topology.machine_rank * topology.local_processes


@dataclass
class Supervisor:
    """The attempts of one start."""

    run: Run
    topology: Topology
    backend: Backend
    signals: Signals
    lock: Lock | None

    def __post_init__(self) -> None:
        self.parent: WarmParent | None = None
        self.warm = self.run.launch.start == "warm"
        self.machines = Machines(self.run.folder, self.topology, self._asked_to_stop, slurm.this_start())
        self.requeue_job = False  # whether the job (if any) is requeued; machine 0 decides this too
        self.number = 1  # of the attempt
        self.heartbeats = make_heartbeat_folder()
        self.restarts = Restarts(self.run.folder)

    def close(self) -> None:
        if self.parent is not None:
            self.parent.close()
        self.machines.close()
        shutil.rmtree(self.heartbeats, ignore_errors=True)

    def run_to_end(self) -> int:
        """Start attempts until the run ends, and return its exit code."""
        try:
            if self._asked_to_stop():
                raise StoppedWaiting
            order = self.machines.join(self._order)
            self._report_cache(order)
            self.restarts.look()
            while order.end is None:
                self._follow(order)
                self.restarts.begin()
                order = self.machines.settle(self._ended(self._attempt()), self._decide)
            return order.end
        except StoppedWaiting:
            received = self.signals.received or signal.SIGTERM
            self._decide_requeue(received)
            self.restarts.look()
            say(f"stopped by {signal.Signals(received).name}", self._kept)
            return 128 + received
        except MachineLost:
            say("error", "machine 0 sends no heartbeat; it decides what is next, so this machine ends too")
            return PEER_LOST

    def _report_cache(self, order: Order) -> None:
        """Print which machine prepares the data. Only machine 1 does: in most runs all others are like it."""
        if self.topology.machine_rank == 1 and order.end is None:
            who = "machine 0 prepares the data" if self.machines.shares_cache else "each prepares the data"
            kind = "shared by" if self.machines.shares_cache else "not shared by"
            say("cache", f"{cache_root()} is {kind} the machines: {who}")

    def _order(self, end: int | None = None) -> Order:
        """Return what all machines do next.

        Each attempt has its own rendezvous: a port that was free for the last attempt may be in use now.
        """
        port = self.run.launch.main_process_port or free_port()
        newest = self.run.train.resume is True  # False for a checkpoint that the user named
        size = self.run.train.batch_size if self.restarts.tried else None
        return Order(attempt.next_attempt(self.run.folder), port, newest, size, end)

    def _follow(self, order: Order) -> None:
        """Set the attempt up. Machine 0 did so when it decided, except for the rendezvous."""
        self.number = order.attempt
        self.topology = replace(self.topology, main_process_port=order.port)
        if order.resume and self.run.train.resume is not True:
            self.run = resumed(self.run)
        while order.batch_size is not None and order.batch_size < self.run.train.batch_size:
            smaller = with_smaller_batch(self.run)
            assert smaller is not None, "machine 0 has found this size in the same way"
            self.run = smaller

    def _attempt(self) -> Outcome:
        """Start the ranks once, and wait until they have ended."""
        files, argv = attempt.prepare(self.run, self.topology, self.backend, self.number)
        files.heartbeats = self.heartbeats
        live = sys.stdout.isatty()
        environ = build_environment(self.run, self.topology, os.environ, files.folder, live, slurm.end_time())
        environ[HEARTBEATS] = str(self.heartbeats)
        if self.topology.num_machines > 1:
            environ[WAITS] = "1" if self.machines.shares_cache else "0"
        for lock in remove_stale_locks(extensions_cache(environ)):
            say("note", f"{lock} is removed: a killed process left it, and the ranks would wait for it.")
        for old in self.heartbeats.iterdir():
            old.unlink()
        watcher = Watcher(
            files,
            self.heartbeats,
            self.run.launch.hang_timeout,
            first_rank(self.topology),
            self.signals,
            self.machines.end_on_other_machine,
            alone=self.topology.num_machines == 1,
        )
        if self.warm:
            try:
                return watcher.follow(
                    WarmLaunch(self._warm_parent(environ), launch_arguments(argv), environ, self._not_needed)
                )
            except NotNeeded:
                return Outcome(files, RUN_FAILED, ended_elsewhere=not self._asked_to_stop())
            except Refused as why:
                say("start", f"accelerate launch, because the ranks cannot be forked: {why}")
                self._drop_parent()
                self.warm = False
        return watcher.follow(AccelerateLaunch(argv, environ, files))

    def _asked_to_stop(self) -> bool:
        return self.signals.received is not None

    def _not_needed(self) -> bool:
        """Whether ranks that have not started yet need not start any more."""
        return self._asked_to_stop() or self.machines.end_on_other_machine() is not None

    def _warm_parent(self, environ: Mapping[str, str]) -> WarmParent:
        """Return the process that forks the ranks. Start a new one if the last has ended, with its spare."""
        if self.parent is not None and self.parent.ended and not self.parent.take_over():
            self._drop_parent()
        if self.parent is None:
            module = f"trainers.{self.run.train.kind.module}"
            deepspeed = self.backend.name == "deepspeed"
            folder = self.run.folder.resolve()
            log = f"{LAUNCH}/{WARM_LOG.format(self.topology.machine_rank)}"
            run_files.append(folder, log, "")
            locks = [] if self.lock is None else self.lock.descriptors
            self.parent = WarmParent(module, deepspeed, environ, folder / log, locks)
        return self.parent

    def _drop_parent(self) -> None:
        if self.parent is not None:
            self.parent.close()
        self.parent = None

    def _ended(self, outcome: Outcome) -> Ended:
        """Return how the attempt ended on this machine."""
        notes = outcome.files.notes(StopNote)
        received = self.signals.received
        number, folder, now = self.topology.machine_rank, str(outcome.files.folder), time.time()
        # A signal that came too late to stop the run does not count: the run has succeeded.
        if received is not None and (outcome.code != 0 or notes):
            saved = next((note.saved for note in notes if note.saved), "")
            return Ended(number, folder, now, stopped=received, saved=saved)
        failure = diagnose(outcome) if outcome.code else None
        return Ended(number, folder, now, failure)

    def _decide(self, ended: list[Ended]) -> Order:
        """Return what all machines do after an attempt."""
        self.restarts.look()
        if stopped := [one for one in ended if one.stopped]:
            return self._order(end=self._report_stop(stopped))
        if all(one.failure is None for one in ended):
            return self._order(end=0)
        cause, failure = first_cause(ended)
        self.requeue_job = cause.lost  # after the loss of a node, continue on other nodes
        if not cause.lost and self._prepare_next(failure):
            return self._order()
        return self._order(end=self._give_up(failure, cause))

    def _report_stop(self, stopped: list[Ended]) -> int:
        """Print that a signal stopped the run and what was saved, and return the exit code."""
        name = signal.Signals(stopped[0].stopped).name
        saved = next((one.saved for one in stopped if one.saved), "")
        self._decide_requeue(stopped[0].stopped)
        if saved:
            say(f"stopped by {name}", f"{saved}; `phalanx train` with --resume continues")
            return SAVED
        say(f"stopped by {name}", f"{self._kept}; logs: {stopped[0].folder}")
        return 128 + stopped[0].stopped

    @property
    def _kept(self) -> str:
        """What a signal leaves if the ranks saved nothing, and how to continue."""
        if self.restarts.newest is None:
            return "nothing was saved"
        return f"`phalanx train` with --resume continues from the newest checkpoint, {self.restarts.newest}"

    def _decide_requeue(self, received: int) -> None:
        """Decide whether the job is requeued after a signal.

        SIGUSR1 and SIGUSR2 warn before the job's end. With SIGTERM and SIGINT a user ends the run, but SLURM
        also sends SIGTERM to a job that it preempts.
        """
        job = slurm.this_job()
        warned = received in (signal.SIGUSR1, signal.SIGUSR2)
        self.requeue_job = warned or (job is not None and slurm.preempted(job))

    def _prepare_next(self, failure: Failure) -> bool:
        """Set the next attempt up. Return False if there is none."""
        following = self.restarts.following(self.run, failure)
        if following is None:
            return False
        self.run, seconds = following
        self._pause(seconds)
        return not self._asked_to_stop()

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._asked_to_stop():
            time.sleep(POLL_SECONDS)

    def _give_up(self, failure: Failure, where: Ended) -> int:
        """Print the failure that ends the run, and return the exit code."""
        lines = []
        if failure.code == OUT_OF_MEMORY:
            lines = advice(self.run, self.backend, self.topology, self.restarts.tried, failure.of_batches)
        elif self.restarts.without_progress >= WITHOUT_PROGRESS:
            lines = [f"{WITHOUT_PROGRESS} attempts in a row made no progress; the run is not restarted."]
        if (received := self.signals.received) is not None:
            self._decide_requeue(received)
            say(f"stopped by {signal.Signals(received).name}", f"between two attempts; {self._kept}")
        shown = first_rank(self.topology) if where.machine == self.topology.machine_rank else -1
        code = report(failure, AttemptFiles(Path(where.folder)), shown, lines)
        return code if received is None else 128 + received
