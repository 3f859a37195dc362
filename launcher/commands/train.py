"""`phalanx train`: check a config, start the ranks, and watch them until they end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.parser import add_config_flags
from trainers.config.errors import ConfigError
from trainers.config.redaction import redacted
from trainers.config.text import count_of
from trainers.rank.say import say

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.plan.topology import Topology

HELP = "check a config, start the ranks, and watch them"
USAGE = "config.yaml [--flag VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="config file (YAML, in AutoTrain's format)")
    add_config_flags(parser)


def run(config: Path | None, **flags: Any) -> int:
    from launcher.config import load_run
    from launcher.plan import topology
    from launcher.slurm import job
    from launcher.supervise import machine_messages

    described = job.resumed_by_slurm(load_run(config, flags))
    try:
        return _train(described, topology.resolve_topology(described.launch, topology.detect_hardware()))
    except machine_messages.AnotherRefused:
        raise
    except Exception as error:
        message, (number, count) = redacted(described.located(str(error))), job.this_node()
        if count > 1:
            machine_messages.refuse(described.folder, number, job.this_start(), message)
        if isinstance(error, ConfigError):
            raise ConfigError(message) from None
        raise


def _train(run: Run, layout: Topology) -> int:
    from launcher.plan import backend, command, preflight, resume_layout
    from launcher.supervise import supervisor
    from launcher.supervise.signals import Signals
    from trainers.storage.data_cache import cache_root

    with Signals() as signals:  # a warning before the job's end may arrive at any moment
        chosen = backend.resolve_backend(run, layout)
        preflight.preflight(run)
        cache_root()  # checked here and not on the login node: a node may have another disk
        run = resume_layout.with_kept_global_batch(run, layout, chosen)
        for note in run.settings.notes:
            say("note", note)
        where = "GPU" if layout.on_gpu else "CPU"
        say("backend", f"{chosen.name} ({chosen.reason}); {count_of(layout.num_processes, where + ' rank')}")
        if layout.num_machines > 1:
            for variable, name in command.socket_interfaces(layout, os.environ).items():
                say("network", f"{variable}={name}, between the {layout.num_machines} machines")
        code = supervisor.train(run, layout, chosen, signals)
    if code == 0 and layout.machine_rank == 0:
        say("done", f"{run.folder} (model, run.json, metrics.jsonl)")
    return code
