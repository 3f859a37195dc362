"""`phalanx data`: show the rows of a config as the model sees them. trainers/show_data.py does the work."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.config import load_run
from launcher.parser import add_config_flags
from launcher.plan.preflight import check_data
from trainers.config.errors import ConfigError
from trainers.config.file import effective_text

HELP = "show the rows as the model sees them, with counts; needs no weights"
USAGE = "config.yaml [--rows N|all] [--split NAME] [--source NAME] [--json | --html FILE] [--flag VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="config file (YAML, in AutoTrain's format)")
    parser.add_argument(
        "--rows", type=_rows, default=5, metavar="N|all", help="how many of the first rows (default: 5)"
    )
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="train", help="which part (default: train)"
    )
    parser.add_argument("--source", metavar="NAME", help="which source, if the config has a mix")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", dest="as_json", help="print only the rows, a JSON object a line"
    )
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    add_config_flags(parser)


def _rows(text: str) -> int:
    """Return how many rows are asked for, and -1 for all."""
    if text == "all":
        return -1
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 on, or all")
    return int(text)


def run(
    config: Path, rows: int, split: str, source: str | None, as_json: bool, html: Path | None, **flags: Any
) -> int:
    """Give the effective config to trainers/show_data.py, on its stdin, and return its exit code.

    Raises:
        ConfigError: the config is wrong, or a split or a column is missing.
    """
    described = load_run(config, flags)
    try:
        check_data(described.train)
    except ConfigError as error:
        raise ConfigError(described.located(str(error))) from None
    argv = [sys.executable, "-m", "trainers.show_data", "/dev/stdin", "--rows", str(rows), "--split", split]
    argv += ["--source", source] if source is not None else []
    argv += ["--json"] if as_json else ["--html", str(html)] if html is not None else []
    environ = dict(os.environ)
    if described.train.token:
        environ["HF_TOKEN"] = described.train.token
    done = subprocess.run(argv, input=effective_text(described.settings), text=True, env=environ, check=False)
    return done.returncode
