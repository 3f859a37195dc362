"""`phalanx llm --train ...`: AutoTrain's flag form of `phalanx train`."""

from __future__ import annotations

import argparse
from typing import Any

from launcher.commands import train as train_command
from launcher.parser import add_config_flags
from trainers.config.errors import ConfigError

HELP = "train from flags only, as `autotrain llm` does"
USAGE = "--train --model NAME --project-name NAME [--flag VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", action="store_true", help="required: this command only trains")
    parser.add_argument("--backend", default="local", metavar="local", help="AutoTrain's key; only local")
    add_config_flags(parser)


def run(train: bool, backend: str, **flags: Any) -> int:
    if not train:
        raise ConfigError(
            "phalanx llm: nothing to do. Add --train (deployment and inference are not supported)."
        )
    if not backend.startswith("local"):
        raise ConfigError(
            "--backend: only local is supported. On a cluster: sbatch slurm/train.sh config.yaml."
        )
    return train_command.run(None, **flags)
