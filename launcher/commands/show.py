"""`phalanx show`: print what `phalanx train` would generate and run. Writes nothing and starts nothing."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from launcher.config import Run, load_run
from launcher.parser import add_config_flags
from launcher.plan import topology
from launcher.plan.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.plan.backend import resolve_backend
from launcher.plan.command import build_command
from launcher.plan.preflight import preflight
from launcher.plan.topology import Topology
from launcher.slurm.request import sbatch_argv
from launcher.supervise.attempt import attempt_files
from trainers.config.errors import ConfigError
from trainers.config.text import count_of
from trainers.rank.protocol import AttemptFiles
from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS, SLURM_SCRIPTS

HELP = "dry run: the effective config, the backend and why, the files and the command"
USAGE = "config.yaml [--flag VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="config file (YAML, in AutoTrain's format)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    add_config_flags(parser, slurm=True)


def run(config: Path, as_json: bool, **flags: Any) -> int:
    described = load_run(config, flags)
    try:
        layout = topology.resolve_topology(described.launch, topology.detect_hardware())
        found = plan(described, layout)
    except ConfigError as error:
        raise ConfigError(described.located(str(error))) from None
    print(json.dumps(found, indent=2) if as_json else render(found))
    return 0


def plan(run: Run, topology: Topology) -> dict[str, Any]:
    """Return everything that `phalanx train` would decide, as JSON types.

    Raises:
        ConfigError: the first problem that would stop the run.
    """
    backend = resolve_backend(run, topology)
    preflight(run)
    files = attempt_files(run, topology)
    argv = build_command(run, topology, backend, files)
    accelerate = build_accelerate_config(backend, topology, run.launch, files.deepspeed_config)
    launch = run.launch.model_dump()
    return {
        "config": run.settings.listed(),
        "launch": {k: {"value": v, "source": run.launch_sources[k]} for k, v in launch.items()},
        "notes": run.settings.notes,
        "backend": {"name": backend.name, "reason": backend.reason},
        "ranks": {
            "num_processes": topology.num_processes,
            "num_machines": topology.num_machines,
            "device": "cuda" if topology.on_gpu else "cpu",
        },
        "accelerate_config": accelerate,
        "deepspeed_config": build_deepspeed_config(backend),
        "folder": str(files.folder),
        "command": argv,
        "by_hand": [
            "accelerate", "launch", "--config_file", str(backend.template),
            "--num_processes", str(topology.num_processes), "-m",
            f"trainers.{run.train.kind.module}", str(run.config_path or "config.yaml"),
        ],
        "sbatch": sbatch_argv(run),
        "static_files": {
            "accelerate_configs": str(ACCELERATE_CONFIGS),
            "deepspeed_configs": str(DEEPSPEED_CONFIGS),
            "slurm": str(SLURM_SCRIPTS),
        },
    }  # fmt: skip


def render(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    lines = ["# effective config"]
    for section in ("config", "launch"):
        width = max(len(name) for name in plan[section])
        for name, entry in plan[section].items():
            lines.append(f"{name:<{width}}  {_as_text(entry['value']):<24}  {entry['source']}")
    if plan["notes"]:
        lines += ["", "# notes", *plan["notes"]]
    ranks, files = plan["ranks"], AttemptFiles(Path(plan["folder"]))
    lines += [
        "",
        "# backend",
        f"{plan['backend']['name']}: {plan['backend']['reason']}",
        f"{count_of(ranks['num_processes'], 'rank')} on {count_of(ranks['num_machines'], 'machine')}, "
        + ranks["device"],
        "",
        f"# {files.accelerate_config}",
        yaml.safe_dump(plan["accelerate_config"], sort_keys=False).rstrip(),
    ]
    if plan["deepspeed_config"]:
        lines += ["", f"# {files.deepspeed_config}"]
        lines.append(yaml.safe_dump(plan["deepspeed_config"], sort_keys=False).rstrip())
    lines += ["", "# command", shlex.join(plan["command"])]
    lines += ["", "# the same by hand", shlex.join(plan["by_hand"])]
    lines += ["", "# on SLURM", shlex.join(plan["sbatch"])]
    lines += ["", "# shipped files", *(f"{name}: {path}" for name, path in plan["static_files"].items())]
    return "\n".join(lines)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
