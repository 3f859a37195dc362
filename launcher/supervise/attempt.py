"""One attempt: its files, its command, and how it ended. The names of the files are in rank/protocol.py."""

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
from trainers.config.file import effective_text
from trainers.rank import no_links
from trainers.rank.protocol import AttemptFiles, attempt_folder, began, machine_folder, run_of
from trainers.storage import run_files


@dataclass
class Outcome:
    """How an attempt ended."""

    files: AttemptFiles
    code: int
    # rank -> exit code, without ranks that the launcher killed
    exits: dict[int, int] = field(default_factory=dict)
    hang: Hang | None = None
    ended_elsewhere: bool = False  # ended on this machine because it had ended on another one

    @property
    def first(self) -> int | None:
        """The rank that failed first. The order is known only if the ranks were forked."""
        return next((rank for rank, code in self.exits.items() if code), None)


def next_attempt(folder: Path) -> int:
    """Return the number of the next free `launch/attempt-K`."""
    number = 1
    while began(attempt_folder(folder, number)):
        number += 1
    return number


def attempt_files(run: Run, topology: Topology, number: int | None = None) -> AttemptFiles:
    """Return the files of an attempt on this machine; without a number, those of the next free attempt."""
    folder = attempt_folder(run.folder.resolve(), number or next_attempt(run.folder))
    several = topology.num_machines > 1
    return AttemptFiles(machine_folder(folder, topology.machine_rank) if several else folder)


def prepare(
    run: Run, topology: Topology, backend: Backend, number: int | None = None
) -> tuple[AttemptFiles, list[str]]:
    """Write the files of an attempt, and return them with the argv of its launch."""
    files = attempt_files(run, topology, number)
    root = run_of(files.folder)
    run_files.own(root, f"{attempt_folder(Path(), number or next_attempt(root))}/")
    no_links.make_folder(root, files.folder)
    no_links.hold(root)
    deepspeed = build_deepspeed_config(backend)
    if deepspeed is not None:
        no_links.write(root, files.deepspeed_config, json.dumps(deepspeed, indent=2) + "\n")
    accelerate = build_accelerate_config(backend, topology, run.launch, files.deepspeed_config)
    no_links.write(root, files.accelerate_config, yaml.safe_dump(accelerate, sort_keys=False))
    no_links.write(root, files.config, effective_text(run.settings))
    argv = build_command(run, topology, backend, files)
    no_links.write(root, files.command, shlex.join(argv) + "\n")
    return files, argv
