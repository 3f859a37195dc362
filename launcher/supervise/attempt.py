"""One attempt: writes its files, starts the ranks with its own rendezvous, and watches them to their end.

<project_name>/launch/attempt-K/  accelerate.yaml deepspeed.json config.json command.txt launcher.log
                                  rank-N.log .pid .stack, and .done, .error.json or .stopped.json at its end
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from launcher.config import Run
from launcher.plan.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.plan.backend import Backend
from launcher.plan.command import build_command
from launcher.plan.topology import Topology
from launcher.supervise.hangs import Hang
from trainers.config.file import write_effective
from trainers.storage.run_folder import LAUNCH


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
