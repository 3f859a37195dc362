"""Starts the ranks, shows rank 0, forwards signals, and says which rank failed first and why.

With auto_find_batch_size an attempt that ran out of memory is followed by one with a smaller batch_size.

<project_name>/launch/attempt-K/  accelerate.yaml deepspeed.json config.json command.txt
                                  launcher.log rank-N.log rank-N.pid rank-N.error.json
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import yaml

from launcher.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.backend import Backend
from launcher.batch_search import advice, announce, with_smaller_batch
from launcher.command import ELASTIC, build_command, build_environment
from launcher.config import Run
from launcher.topology import Topology
from trainers.config import OUT_OF_MEMORY, RUN_FAILED, USAGE_ERROR
from trainers.config_file import write_effective
from trainers.out_of_memory import BatchTooLarge
from trainers.rank import die_with_parent
from trainers.run_folder import LAUNCH, checkpoints, claim, resume_checkpoint

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # between a forwarded signal and SIGKILL
LOG_LINES = 25  # of a failed rank's log that are shown
# What the other ranks report when one dies: the consequence, not the cause.
_PEER_LOST = re.compile(
    r"Connection (closed|reset)|Broken pipe|NCCL.*(abort|remote)|Socket Timeout|recvValue failed", re.I
)
# torchrun's summary: "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 4711)"
_SUMMARY = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")


@dataclass(frozen=True)
class Failure:
    """The rank that failed first: its number, the reason in a line, and the exit code that it stands for."""

    rank: int
    reason: str
    code: int = RUN_FAILED
    of_batches: bool = False  # it ran out of memory, and a smaller micro-batch needs less


def attempt_folder(run: Run, topology: Topology) -> Path:
    """The next free `launch/attempt-K`, per machine where there are several (all then agree on K)."""
    part = f"machine-{topology.machine_rank}" if topology.num_machines > 1 else ""
    number = 1
    while (run.folder / LAUNCH / f"attempt-{number}" / part / "command.txt").exists():
        number += 1
    return (run.folder / LAUNCH / f"attempt-{number}" / part).resolve()


def prepare(run: Run, topology: Topology, backend: Backend) -> tuple[Path, list[str]]:
    """Writes the files of the next attempt; returns their folder and the argv."""
    folder = attempt_folder(run, topology)
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


def train(run: Run, topology: Topology, backend: Backend) -> int:
    """Runs the training to its end and returns its exit code (see docs/exit-codes.md)."""
    if topology.machine_rank == 0:
        claim(run.folder, run.train)
    earlier = _saved(run)
    tried: list[int] = []
    with _Forwarder() as signals:
        while True:
            folder, code = _attempt(run, topology, backend, signals)
            if signals.received is not None:
                print(f"stopped by {signal.Signals(signals.received).name}; logs: {folder}", file=sys.stderr)
                return 128 + signals.received
            if code == 0:
                return 0
            failure = first_failure(folder)
            if failure is None or not failure.of_batches:
                break
            tried.append(run.train.batch_size)
            smaller = _smaller(run, earlier, failure)
            if smaller is None:
                break
            run = smaller
    lines = []
    if failure is not None and failure.code == OUT_OF_MEMORY:
        lines = advice(run, backend, topology, tried, failure.of_batches)
    return report(failure, folder, first_rank(topology), lines)


def _attempt(run: Run, topology: Topology, backend: Backend, signals: _Forwarder) -> tuple[Path, int]:
    """Starts the ranks once, and waits for their end; returns the attempt's folder and the launch's code."""
    folder, argv = prepare(run, topology, backend)
    environment = build_environment(run, topology, os.environ, folder, sys.stdout.isatty())
    with (folder / "launcher.log").open("wb") as log:
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
            preexec_fn=die_with_parent,  # if we are killed, accelerate goes too, and the ranks with it
        )
        signals.watch(process)
        code = _follow(process, folder / f"rank-{first_rank(topology)}.log", signals)
        _kill_leftovers(process, folder)
    shutil.rmtree(folder / ELASTIC, ignore_errors=True)
    return folder, code


def _smaller(run: Run, earlier: dict[Path, int], failure: Failure) -> Run | None:
    """The next attempt with a smaller micro-batch, said in a line; None where none is left or none asked for.

    It goes on from what this start wrote; a checkpoint that lay there before may be of another config.
    """
    if not run.train.auto_find_batch_size:
        return None
    written = [path for path, changed in _saved(run).items() if earlier.get(path) != changed]
    smaller = with_smaller_batch(run, written[-1] if written else None)
    if smaller is not None:
        begins = resume_checkpoint(smaller.folder, smaller.train)
        print(announce(run, smaller, failure.rank, begins), flush=True)
    return smaller


def _saved(run: Run) -> dict[Path, int]:
    """The finished checkpoints of the run's folder, oldest first, and when each was written."""
    return {path: (path / "trainer_state.json").stat().st_mtime_ns for path in checkpoints(run.folder)}


def first_rank(topology: Topology) -> int:
    """The lowest rank of this machine: the one whose output the terminal shows."""
    return topology.machine_rank * topology.local_processes


class _Forwarder:
    """Passes SIGINT and SIGTERM on to the launch.

    Kills it when it does not end in time, or is asked twice.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.received: int | None = None
        self.deadline = float("inf")

    def __enter__(self) -> _Forwarder:
        self.old = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Takes the launch that signals go to; one that came just before it was there reaches it now."""
        self.process = process
        if self.received is not None:
            process.send_signal(self.received)

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            self.deadline = 0.0
            return
        self.received = number
        self.deadline = time.monotonic() + GRACE_SECONDS
        if self.process is not None:
            self.process.send_signal(number)


def _follow(process: subprocess.Popen[bytes], log: Path, signals: _Forwarder) -> int:
    """Copies the log of one rank to the terminal until the launch ends."""
    stream: BinaryIO | None = None
    try:
        while True:
            ended = process.poll() is not None
            if stream is None and log.exists():
                stream = log.open("rb")
            if stream is not None and (chunk := stream.read()):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            if ended:
                return process.returncode
            if time.monotonic() > signals.deadline:
                process.kill()
            time.sleep(POLL_SECONDS)
    finally:
        if stream is not None:
            stream.close()


def _kill_leftovers(process: subprocess.Popen[bytes], folder: Path) -> None:
    """No process stays behind: what the launch left alive is killed. A rank leads a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    left = [int(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.pid")]
    left = [pid for pid in left if _is_rank(pid, folder)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + GRACE_SECONDS
    while any(_is_rank(pid, folder) for pid in left) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)  # the next attempt needs the memory that they hold


def _is_rank(pid: int, folder: Path) -> bool:
    """Whether a pid is still our rank, and not another process that got the number."""
    try:
        return str(folder / "config.json").encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def first_failure(folder: Path) -> Failure | None:
    """Which rank failed first.

    Memory that ran out is a cause, never a consequence. A rank that was killed from outside comes before the
    errors that its peers report.
    """
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank-*.error.json")]
    notes.sort(key=lambda note: (bool(_PEER_LOST.search(note["message"])), note["time"]))
    short = [note for note in notes if note["code"] == OUT_OF_MEMORY]
    if short:
        return _failure(short[0])
    summary = (folder / "launcher.log").read_text(encoding="utf-8", errors="replace")
    for rank, code in _SUMMARY.findall(summary):
        number = -int(code)
        if number > 0 and number not in (signal.SIGTERM, signal.SIGINT):
            hint = " (out of memory, or killed by hand)" if number == signal.SIGKILL else ""
            return Failure(int(rank), f"killed by {signal.Signals(number).name}{hint}")
    return _failure(notes[0]) if notes else None


def _failure(note: dict[str, Any]) -> Failure:
    """What the note of a rank (trainers/rank.py) says."""
    if note["code"] == USAGE_ERROR:
        return Failure(note["rank"], note["message"], USAGE_ERROR)
    first = next(iter(note["message"].strip().splitlines()), "")
    reason = f"{note['type']}: {first}"
    return Failure(note["rank"], reason, note["code"], note["type"] == BatchTooLarge.__name__)


def report(failure: Failure | None, folder: Path, shown: int, lines: Sequence[str] = ()) -> int:
    """Prints what went wrong, last things last, and returns the exit code.

    `shown` is the rank whose log the terminal has already; `lines` say what to do.
    """
    if failure is not None and failure.code == USAGE_ERROR:
        print(f"error: {failure.reason}", file=sys.stderr)
        return USAGE_ERROR
    log = folder / (f"rank-{failure.rank}.log" if failure else "launcher.log")
    if log.exists() and (failure is None or failure.rank != shown):
        print(f"--- end of {log}", file=sys.stderr)
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]:
            print(f"    {line}", file=sys.stderr)
    if failure is not None:
        print(f"error: rank {failure.rank} failed first: {failure.reason}", file=sys.stderr)
    else:
        print("error: the launch failed before a rank could say why; its log is above", file=sys.stderr)
    for line in (*lines, f"logs of all ranks: {folder}"):
        print(f"       {line}", file=sys.stderr)
    return failure.code if failure else RUN_FAILED
