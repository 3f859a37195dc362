"""`phalanx evaluate RUN ...`: evaluate a run's final model with lm-eval on all GPUs of this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launcher.plan.topology import detect_hardware, free_port
from trainers.config.errors import ConfigError
from trainers.evaluate import ACCELERATE, LM_EVAL
from trainers.rank.no_links import LinkFound
from trainers.storage.run_place import check_output
from trainers.storage.saved_model import ADAPTER
from trainers.storage.state_files import damaged, read_object

HIDING = "trainers.evaluate"  # runs the module that follows, with secrets hidden
SAVE_AGAIN = "Save the model again."
RESULTS = "evaluation"  # in the run's folder
EXTRA = "pip install 'phalanx[evaluate]'"
HELP = "evaluate a run's final model with lm-eval, which gets everything after RUN"
USAGE = "RUN --tasks NAMES [...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run's folder")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for lm-eval, such as --tasks arc_easy")


def run(folder: Path, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by lm-eval, so that lm-eval gets the signals and its exit code is the command's.

    Raises:
        ConfigError: there is no model, or lm-eval is not installed.
    """
    argv = command(folder, arguments, len(detect_hardware().gpus))
    if importlib.util.find_spec(LM_EVAL) is None:
        raise ConfigError(f"evaluate: lm-eval is not installed. Install it: {EXTRA}.")
    os.execv(argv[0], argv)


def command(folder: Path, arguments: Sequence[str], gpus: int) -> list[str]:
    """Return lm-eval's argv. Each GPU has a full model, unless the user gives parallelize=True to lm-eval.

    Raises:
        ConfigError: there is no model, or an argument is not supported.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_args", "-a", nargs="+", default=[])
    parser.add_argument("--output_path", "-o", default=str(folder / RESULTS))
    if (folder / RESULTS).is_symlink():
        raise LinkFound(folder / RESULTS)
    given, rest = parser.parse_known_args(arguments)
    check_output(Path(given.output_path))
    if any(word.startswith("{") for word in given.model_args):
        raise ConfigError(
            "--model_args: JSON cannot be joined with the model's own arguments. Write name=value."
        )
    model = ",".join(f"{name}={value}" for name, value in _model(folder).items())
    spread = any(word.lower() == "parallelize=true" for a in given.model_args for word in a.split(","))
    launch = [sys.executable, "-m", HIDING]
    if gpus > 1 and not spread:
        launch += [ACCELERATE, "--multi_gpu", "--num_machines", "1"]
        launch += ["--num_processes", str(gpus), "--main_process_port", str(free_port())]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", HIDING]
    own = ["--model", "hf", "--model_args", model, *given.model_args, "--output_path", given.output_path]
    return [*launch, LM_EVAL, "run", *own, *rest]


def _model(folder: Path) -> dict[str, str]:
    """Return lm-eval's arguments for the model: a full model, or an adapter and its base model."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Give a run's folder.")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no final model, and no such folder. Give a run's folder.")
    adapter = folder / ADAPTER
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        found = {"pretrained": str(folder)}
    elif adapter.is_file():
        base = read_object(adapter, SAVE_AGAIN).get("base_model_name_or_path")
        if not base:
            raise damaged(adapter, "it does not name the base model", SAVE_AGAIN)
        found = {"pretrained": str(base), "peft": str(folder), "tokenizer": str(folder)}
    else:
        raise ConfigError(
            f"{folder}: there is no final model. Wait until the run ends, or convert a checkpoint: "
            f"phalanx consolidate {folder}."
        )
    for value in found.values():
        if "," in value or "=" in value:
            raise ConfigError(
                f"{value}: lm-eval cannot load a path with a comma or an equals sign. Rename the folder."
            )
    return found
