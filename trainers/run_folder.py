"""The run's folder: what lies where, whether it is free, and the record of the run.

<project_name>/                  final model, tokenizer, run.json, metrics.jsonl
<project_name>/checkpoint-N/     checkpoints
<project_name>/launch/attempt-K/ what the launcher generated, and each rank's log
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainers.config import ConfigError, TrainConfig
from trainers.settings import Settings

RECORD = "run.json"
METRICS = "metrics.jsonl"
CHECKPOINT_PREFIX = "checkpoint-"
LAUNCH = "launch"
TRACKER = "tracker.json"  # the id under which each start goes on with the same tracked run
# Machine 0 marks an attempt; another machine of the same start may have made its own files already.
LAUNCHED = (f"{LAUNCH}/attempt-*/command.txt", f"{LAUNCH}/attempt-*/machine-0/command.txt")
VERSIONS = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "phalanx",
)


def holds_run(folder: Path) -> bool:
    """Whether a run was started here before."""
    marks = (RECORD, f"{CHECKPOINT_PREFIX}*", *LAUNCHED)
    return any(True for mark in marks for _ in folder.glob(mark))


def check_free(folder: Path, config: TrainConfig) -> None:
    """Refuses a folder that holds another run, unless the config resumes or overwrites it.

    Raises:
        ConfigError: the folder is taken, or there is nothing to resume.
    """
    for part in (folder, *folder.parents):
        if part.is_file():
            raise ConfigError(f"project_name: {part} is a file. Give another name.")
    if holds_run(folder) and not (config.resume or config.overwrite):
        raise ConfigError(
            f"project_name: {folder} holds another run. Go on with it: --resume. "
            "Start anew: --overwrite (deletes it). Or give another project_name."
        )
    if config.resume:
        resume_checkpoint(folder, config)


def claim(folder: Path, config: TrainConfig) -> None:
    """Makes the folder this run's own.

    With overwrite, deletes what the earlier run left, and nothing else.
    """
    check_free(folder, config)
    if config.overwrite and holds_run(folder):
        for mark in LAUNCHED:
            for command in folder.glob(mark):
                shutil.rmtree(folder / LAUNCH / command.relative_to(folder / LAUNCH).parts[0])
        for path in folder.iterdir():
            if path.name.startswith(CHECKPOINT_PREFIX) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name in (RECORD, METRICS, TRACKER):
                path.unlink()
        remove_model(folder)
    folder.mkdir(parents=True, exist_ok=True)


def remove_model(folder: Path) -> None:
    """Removes the final model that an earlier start left, adapter or whole."""
    for path in folder.iterdir():
        if path.name.endswith((".safetensors", ".safetensors.index.json", "adapter_config.json")) or (
            path.name == "config.json"
        ):
            path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first: the trainer's state is in them, and no save is under way."""
    found = []
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        number = path.name.removeprefix(CHECKPOINT_PREFIX)
        if number.isdigit() and (path / "trainer_state.json").is_file():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def resume_checkpoint(folder: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    Raises:
        ConfigError: resume was asked for and there is none.
    """
    if not config.resume:
        return None
    if isinstance(config.resume, str):
        path = Path(config.resume)
        named = path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
        if not (named and (path / "trainer_state.json").is_file()):
            raise ConfigError(
                f"resume: {path} is not a finished checkpoint: checkpoint-N with trainer_state.json in it."
            )
        return path
    found = checkpoints(folder)
    if not found:
        raise ConfigError(f"resume: there is no finished checkpoint in {folder}. Start without --resume.")
    return found[-1]


def step_of(checkpoint: Path | None) -> int:
    """The optimiser step that a checkpoint was written at; 0 for a fresh start."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def write_record(folder: Path, settings: Settings, facts: dict[str, Any]) -> None:
    """Writes run.json: each value with where it came from, the versions, and the facts of this start."""
    config = {
        name: {"value": value, "source": settings.sources[name]} for name, value in settings.public().items()
    }
    record = {"config": config, "notes": settings.notes, **facts, "versions": versions()}
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / RECORD)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers; those that are installed."""
    return {name: version for name in VERSIONS if (version := version_of(name)) is not None}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
