"""Faults in real ranks: how to plant them, and the uninterrupted run whose result they must not change."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import HELPERS
from ranks import BACKENDS, Bench, Finished
from terminals import Terminal

from trainers.rank.proc_stat import read_stat
from trainers.rank.protocol import WARM

PLANT = HELPERS / "plant"
STEPS, EVERY = 12, 4
FLAGS = [
    "--max-steps",
    str(STEPS),
    "--save-steps",
    str(EVERY),
    "--save-total-limit",
    "2",
    "--eval-strategy",
    "no",
]
PATIENCE = 150.0
LORA = ("--peft", "--quantization", "none", "--lora-dropout", "0.3", "--lora-r", "4")


@dataclass
class Running:
    """A run that a test acts on while it runs."""

    folder: Path
    process: Any

    @property
    def attempt(self) -> Path:
        return self.folder / "launch" / "attempt-1"

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition. PATIENCE is a limit, not a measurement."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "the run did not reach this point"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.steps >= step)

    def pid(self, rank: int) -> int:
        return int((self.attempt / f"rank-{rank}.pid").read_text())

    def end(self) -> Finished:
        out, err = self.process.communicate(timeout=PATIENCE)
        return Finished(self.folder, self.process.returncode, out, err)


@dataclass
class Faults:
    """Starts runs with a planted fault, and compares their results."""

    bench: Bench
    warm: str  # PHALANX_WARM for a run with a fault
    started: list[Any]
    finished: dict[tuple[str, ...], Finished]  # runs without a fault, by their flags

    def _flags(self, backend: str, more: tuple[str, ...]) -> list[str]:
        return [*BACKENDS[backend], *FLAGS, *more]

    def environ(self, name: str, kept: bool = True, **fault: Any) -> dict[str, str]:
        """Return the variables of a run. `kept`: the process that the session keeps forks its ranks."""
        once = self.bench.root / f"{name}.once"
        planted = {"PYTHONPATH": str(PLANT), "PHALANX_FAULT": json.dumps({"once": str(once), **fault})}
        return planted | {WARM: self.warm if kept else ""}

    def run(self, name: str, backend: str, *flags: str, **fault: Any) -> Finished:
        return self.bench.train(name, *self._flags(backend, flags), **self.environ(name, **fault))

    def start(
        self, name: str, backend: str, *flags: str, terminal: Terminal | None = None, **fault: Any
    ) -> Running:
        environ = self.environ(name, **fault)
        process = self.bench.start(name, *self._flags(backend, flags), terminal=terminal, **environ)
        self.started.append(process)
        return Running(self.bench.root / name, process)

    def uninterrupted(self, backend: str, *flags: str) -> Finished:
        """Return the run without a fault, which is made once a session."""
        key = (backend, *flags)
        if key not in self.finished:
            name = f"uninterrupted-{len(self.finished)}"
            done = self.bench.train(name, *self._flags(backend, flags))
            assert done.code == 0, done.out + done.err
            self.finished[key] = done
        return self.finished[key]

    def same_end(self, run: Finished, backend: str, *flags: str) -> None:
        """Check that the final weights are equal, bit for bit, the loss of each step, and that of the run."""
        expected = self.uninterrupted(backend, *flags)
        assert run.code == 0, run.out + run.err
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (expected.folder / name).exists():
                assert (run.folder / name).read_bytes() == (expected.folder / name).read_bytes()
        assert run.losses == expected.losses
        of_run, of_expected = (
            [entry["train_loss"] for entry in end.metrics if "train_loss" in entry] for end in (run, expected)
        )
        assert of_run == pytest.approx(of_expected) and len(of_run) == 1
        assert [entry["step"] for entry in run.metrics if "loss" in entry] == list(range(1, STEPS + 1))


def fill(folder: Path, left: int = 0) -> Path:
    """Fill the file system of a folder but for `left` bytes, by a file there, and return it."""
    path = folder / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(folder).free - left, 1))
    return path


def processes(folder: Path) -> dict[int, bytes]:
    """Return the processes of a run: pid -> command line.

    Their command line or environment has its folder, or a rank began their session: that of a forked rank
    has the command line of the process that imported the libraries.
    """
    sessions = {int(path.read_text() or 0) for path in folder.glob("launch/attempt-*/**/rank-*.pid")}
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                known = str(folder / "launch").encode() in command + (entry / "environ").read_bytes()
                stat = read_stat(int(entry.name))
            except OSError:
                continue
            if known or (
                stat.session in sessions and stat.state not in ("Z", "X") and b"trainers" in command
            ):
                found[int(entry.name)] = command
    return found


def alive(folder: Path) -> list[str]:
    """Return the processes that a run has left."""
    return [f"{pid}: {command!r}" for pid, command in processes(folder).items()]
