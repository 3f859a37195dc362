"""One attempt: writes its files, starts the ranks with its own rendezvous, and watches them to their end.

<project_name>/launch/attempt-K/  accelerate.yaml deepspeed.json config.json command.txt launcher.log
                                  rank-N.log .pid .stack, and .done, .error.json or .stopped.json at its end
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Protocol

import yaml

from launcher.config import Run
from launcher.plan.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.plan.backend import Backend
from launcher.plan.command import ELASTIC, build_command
from launcher.plan.topology import Topology
from launcher.supervise.hangs import Hang, Wakefulness, find_hang
from launcher.supervise.warm_parent import WarmParent
from trainers.config.file import write_effective
from trainers.rank.process import die_with_parent
from trainers.rank.signals import SIGNALS
from trainers.storage.run_folder import LAUNCH

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # for the other ranks to say what they saw, after one failed
WORDS = ("done", "error.json", "stopped.json")  # what a rank leaves that ends by itself
# torchrun's summary: "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 4711)"
_SUMMARY = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")


@dataclass
class Outcome:
    """How an attempt ended."""

    folder: Path
    code: int
    exits: dict[int, int] = field(default_factory=dict)  # rank -> exit code, of those not killed by us
    hang: Hang | None = None
    cut: bool = False  # ended here because it had ended on another machine

    @property
    def first(self) -> int | None:
        """The rank that ended first, of those that failed; of forked ranks the order is known."""
        return next((rank for rank, code in self.exits.items() if code), None)


def next_attempt(folder: Path) -> int:
    """The number of the next free `launch/attempt-K`."""
    number = 1
    while _holds_attempt(folder / LAUNCH / f"attempt-{number}"):
        number += 1
    return number


def _holds_attempt(folder: Path) -> bool:
    return any(True for mark in ("command.txt", "machine-*/command.txt") for _ in folder.glob(mark))


def attempt_folder(run: Run, topology: Topology, number: int | None = None) -> Path:
    """`launch/attempt-K`, the next free one if no number is given; per machine where there are several."""
    part = f"machine-{topology.machine_rank}" if topology.num_machines > 1 else ""
    return (run.folder / LAUNCH / f"attempt-{number or next_attempt(run.folder)}" / part).resolve()


def prepare(
    run: Run, topology: Topology, backend: Backend, number: int | None = None
) -> tuple[Path, list[str]]:
    """Writes the files of an attempt; returns their folder and the argv."""
    folder = attempt_folder(run, topology, number)
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed = build_deepspeed_config(backend)
    if deepspeed is not None:
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")
    accelerate = build_accelerate_config(backend, topology, run.launch, folder / "deepspeed.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(accelerate, sort_keys=False), encoding="utf-8")
    write_effective(run.settings, folder / "config.json")
    argv = build_command(run, topology, backend, folder)
    (folder / "command.txt").write_text(shlex.join(argv) + "\n", encoding="utf-8")
    return folder, argv


class Launch(Protocol):
    """Ranks that were started, by either way."""

    def ranks(self) -> dict[int, int]:
        """The ranks of this machine that are known to run: rank -> pid."""

    def wait(self, seconds: float) -> int | None:
        """The code of the launch when all ranks are gone; None where some are there after so many seconds."""

    def exits(self) -> dict[int, int]:
        """Exit codes of the ranks that ended so far, negative where a signal killed one."""

    def kill(self) -> None:
        """SIGKILL to every rank: a stopped one would not act on SIGTERM."""


class AccelerateLaunch:
    """Ranks started by `accelerate launch`, which is a process of its own above them."""

    def __init__(self, argv: list[str], environ: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        self.killed: set[int] = set()  # ranks that we have killed
        with (folder / "launcher.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
                preexec_fn=die_with_parent,  # if we are killed, accelerate goes too, and the ranks with it
            )

    def ranks(self) -> dict[int, int]:
        found = {}
        for path in self.folder.glob("rank-*.pid"):
            text = path.read_text(encoding="utf-8")
            if text and self._is_rank(int(text)):
                found[int(path.stem.partition("-")[2])] = int(text)
        return found

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self._end_what_waits()
        if self.process.returncode is not None:
            self.kill()  # no process stays behind
            shutil.rmtree(self.folder / ELASTIC, ignore_errors=True)
        return self.process.returncode

    def _end_what_waits(self) -> None:
        """SIGKILL to the other ranks when one died without a word.

        torchrun asks them to end with SIGTERM, and gives those that wait for the dead one 30 s.
        """
        alive, pids = self.ranks(), self.folder.glob("rank-*.pid")
        gone = {int(path.stem.partition("-")[2]) for path in pids if path.stat().st_size} - alive.keys()
        if any(not self._left_word(rank) for rank in gone):
            for rank, pid in alive.items():
                self.killed.add(rank)
                _kill(pid)

    def _left_word(self, rank: int) -> bool:
        """Whether a rank has ended by itself (trainers/rank/process.py)."""
        return any((self.folder / f"rank-{rank}.{kind}").exists() for kind in WORDS)

    def exits(self) -> dict[int, int]:
        """From torchrun's summary, which is there when it has ended; it ends the other ranks with SIGTERM."""
        if self.process.returncode is None:
            return {}
        text = (self.folder / "launcher.log").read_text(encoding="utf-8", errors="replace")
        codes = {int(rank): int(code) for rank, code in _SUMMARY.findall(text)}
        ours = {rank for rank, code in codes.items() if -code in (signal.SIGTERM, signal.SIGINT)}
        return {rank: code for rank, code in codes.items() if rank not in ours | self.killed}

    def kill(self) -> None:
        if self.process.returncode is None:
            _kill(self.process.pid)
        _kill_session(self.process.pid)
        for pid in self.ranks().values():
            _kill(pid)
            _kill_session(pid)
        while self.ranks():
            time.sleep(POLL_SECONDS)  # the next attempt needs the memory that they hold

    def _is_rank(self, pid: int) -> bool:
        """Whether a pid is still our rank, and not another process that got the number."""
        try:
            return str(self.folder / "config.json").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False


class WarmLaunch:
    """Ranks that a warm parent has forked."""

    def __init__(
        self, parent: WarmParent, argv: list[str], environ: Mapping[str, str], given_up: Callable[[], bool]
    ) -> None:
        self.parent = parent
        self.pids = parent.start(argv, environ, given_up)
        self.codes: dict[int, int] = {}

    def ranks(self) -> dict[int, int]:
        return {rank: pid for rank, pid in self.pids.items() if rank not in self.codes}

    def wait(self, seconds: float) -> int | None:
        for answer in self.parent.answers(seconds):
            rank = answer["exited"]["rank"]
            self.codes[rank] = answer["exited"]["code"]
            _kill_session(self.pids[rank])  # what it started
        if len(self.codes) == len(self.pids):
            return next((code for code in self.codes.values() if code), 0)
        return -signal.SIGKILL if self.parent.ended else None

    def exits(self) -> dict[int, int]:
        return dict(self.codes)

    def kill(self) -> None:
        for pid in self.ranks().values():
            _kill(pid)
            _kill_session(pid)


def _kill_session(leader: int) -> None:
    """A rank leads a session: its data workers are in it, and compilers, which have groups of their own."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(encoding="utf-8").rpartition(") ")[2].split()
            if int(fields[3]) == leader:
                _kill(int(path.parent.name))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Signals:
    """SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 to the launcher are passed to each rank, once.

    They save and end (trainers/rank/signals.py). Asked twice with SIGINT or SIGTERM, the ranks are killed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.twice = False
        self.passed: set[int] = set()  # pids

    def __enter__(self) -> Signals:
        self.old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        ends = (signal.SIGINT, signal.SIGTERM)
        if self.received is None:
            name = signal.Signals(number).name
            os.write(2, f"{name}: what trains saves at the end of this step, then stops\n".encode())
            self.received = number
        elif number in ends and self.received in ends:
            self.twice = True
        elif number in ends:  # somebody ends what was only warned
            self.received = number

    def pass_on(self, ranks: Mapping[int, int]) -> None:
        """Passes what was received to the ranks that have not got it."""
        for pid in ranks.values() if self.received is not None else ():
            if pid not in self.passed:
                self.passed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self.received or signal.SIGTERM)


class Elsewhere(Protocol):
    """How the attempt ended on another machine, where this one must end too."""

    @property
    def stopped(self) -> int:
        """The signal that ended it, or 0."""


def nowhere() -> None:
    """A run of one machine."""


@dataclass
class Watcher:
    """What is looked at while an attempt runs."""

    folder: Path
    beats: Path
    hang_timeout: float | None
    shown: int  # the rank whose log goes to the terminal
    signals: Signals
    elsewhere: Callable[[], Elsewhere | None] = nowhere

    def follow(self, launch: Launch) -> Outcome:
        """Watches the ranks until all are gone."""
        deadline = float("inf")
        exits: dict[int, int] = {}
        hang, cut, awake = None, False, Wakefulness()
        with _Tail(self.folder / f"rank-{self.shown}.log") as tail:
            while (code := launch.wait(POLL_SECONDS)) is None:
                tail.show()
                now, since = time.monotonic(), awake.look()
                if now < deadline:
                    exits = launch.exits()
                    if -signal.SIGKILL in exits.values():
                        deadline = now  # nothing that the others may say is the cause
                    elif any(exits.values()):
                        deadline = min(deadline, now + GRACE_SECONDS)
                if (other := self.elsewhere()) is not None:
                    cut = True
                    self.signals.received = self.signals.received or other.stopped or None
                if self._stopped_early() or cut:
                    # Another rank may wait in C++ for what this one was to send, and hear of no signal there.
                    deadline = min(deadline, now + GRACE_SECONDS)
                self.signals.pass_on(launch.ranks())
                if hang is None and now < deadline:
                    hang = find_hang(self.beats, launch.ranks(), self.hang_timeout, self.folder, since)
                if hang is not None or self.signals.twice or now >= deadline:
                    launch.kill()
            tail.show()
        if hang is None and not self.signals.twice and time.monotonic() < deadline:
            exits = launch.exits()
        return Outcome(self.folder, code, exits, hang, cut)

    def _stopped_early(self) -> bool:
        """Whether a rank stopped before the ranks could agree on it, with nothing to save.

        The signal may have come to that rank alone: it is then passed to the others, as if it were ours.
        """
        early = False
        for path in self.folder.glob("rank-*.stopped.json"):
            with contextlib.suppress(ValueError):  # it is being written
                note = json.loads(path.read_text(encoding="utf-8"))
                self.signals.received = self.signals.received or note["signal"]
                early = early or not note["saved"]
        return early


class _Tail:
    """Copies what is new in a log to the terminal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream: BinaryIO | None = None

    def __enter__(self) -> _Tail:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def show(self) -> None:
        if self.stream is None and self.path.exists():
            self.stream = self.path.open("rb")
        if self.stream is not None and (chunk := self.stream.read()):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
