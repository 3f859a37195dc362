"""Faults in real ranks: where they are planted, and the run that they must not change the end of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import HELPERS
from ranks import BACKENDS, Bench, Finished

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
    """A run that a test acts on while it goes on."""

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
        """A limit, not a measurement."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "the run did not come so far"
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
    """Starts runs with a fault planted, and compares their ends."""

    bench: Bench
    warm: str  # PHALANX_WARM of a run with a fault
    started: list[Any]
    whole: dict[tuple[str, ...], Finished]

    def _flags(self, backend: str, more: tuple[str, ...]) -> list[str]:
        return [*BACKENDS[backend], *FLAGS, *more]

    def environ(self, name: str, kept: bool = True, **fault: Any) -> dict[str, str]:
        """`kept`: the run's ranks are forked by the process that the session keeps, not by one of its own."""
        once = self.bench.root / f"{name}.once"
        planted = {"PYTHONPATH": str(PLANT), "PHALANX_FAULT": json.dumps({"once": str(once), **fault})}
        return planted | {WARM: self.warm if kept else ""}

    def run(self, name: str, backend: str, *flags: str, **fault: Any) -> Finished:
        return self.bench.train(name, *self._flags(backend, flags), **self.environ(name, **fault))

    def start(self, name: str, backend: str, *flags: str, **fault: Any) -> Running:
        process = self.bench.start(name, *self._flags(backend, flags), **self.environ(name, **fault))
        self.started.append(process)
        return Running(self.bench.root / name, process)

    def uninterrupted(self, backend: str, *flags: str) -> Finished:
        """The run without a fault, made once a session."""
        key = (backend, *flags)
        if key not in self.whole:
            name = f"whole-{len(self.whole)}"
            done = self.bench.train(name, *self._flags(backend, flags))
            assert done.code == 0, done.out + done.err
            self.whole[key] = done
        return self.whole[key]

    def same_end(self, run: Finished, backend: str, *flags: str) -> None:
        """The final weights, bit for bit, and the loss of each step."""
        whole = self.uninterrupted(backend, *flags)
        assert run.code == 0, run.out + run.err
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (whole.folder / name).exists():
                assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
        assert run.losses == whole.losses
        assert [entry["step"] for entry in run.metrics if "loss" in entry] == list(range(1, STEPS + 1))


def alive(folder: Path) -> list[str]:
    """Processes that belong to a run: its folder stands in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder / "launch").encode() in known:
                found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
    return found
