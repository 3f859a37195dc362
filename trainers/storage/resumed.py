"""Compare a resume with what it resumes: with the manifest of a checkpoint, or the record of a finished run.

The launcher compares the config, before anything starts. The ranks also compare what only they know: the rows
and the weights that the run reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.on_resume import ANEW, FIXED, same_length, settled, why_refused, why_too_short
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.storage import run_files
from trainers.storage.ending import Ending
from trainers.storage.identity import RECORD, recorded
from trainers.storage.manifest import read_manifest
from trainers.storage.run_folder import FINISHED, resume_checkpoint

INPUTS = "inputs"  # the key of run.json that has Inputs
MODEL_FOLDERS = "model_folders"  # and the one that has the models which were folders, not ids on the hub


@dataclass(frozen=True)
class Inputs:
    """What a run reads, as hashes: they are compared, and not the names of the files."""

    rows: str  # the rows of each part, and how they are tokenized
    weights: dict[str, str] = field(default_factory=dict)  # base_model, and model_ref if there is one


def check_resume(folder: Path, config: TrainConfig) -> None:
    """Check that the config changes only what a resume may change. Reads no weights, and needs no torch.

    Raises:
        ConfigError: it changes something else; the message names the fields.
    """
    checkpoint, _ = resume_checkpoint(folder, config, content=False)
    last_step = config.max_steps if config.max_steps > 0 else None  # with epochs only a rank knows it
    record = read_record(folder) if config.resume is True and (folder / FINISHED).is_file() else None
    if record is not None:
        check_finished(folder, record, config)
    elif checkpoint is not None:
        check_checkpoint(checkpoint, config, last_step)


def check_finished(
    folder: Path, record: dict[str, Any], config: TrainConfig, inputs: Inputs | None = None
) -> None:
    """Check that a resume of a finished run fits its record. `record`: read_record().

    Raises:
        ConfigError: it changes what a resume cannot change.
    """
    _refuse(why_refused(str(folder), trained_config(record), config))
    then = record.get(INPUTS)
    if inputs is not None and then is not None:
        check_inputs(str(folder), Inputs(**then), inputs)


def has_steps_left(
    folder: Path, ending: Ending, record: dict[str, Any] | None, config: TrainConfig, last_step: int | None
) -> bool:
    """Return whether a resume of a finished run, which would end at `last_step`, trains. None: not known.

    With the same length it has ended, also if a step has another size now.

    Raises:
        ConfigError: the run would end before the step that it is trained to.
    """
    if record is not None and same_length(trained_config(record), config):
        return False
    if last_step is not None:
        _refuse(why_too_short(str(folder), ending.step, config, last_step))
    return ending.step != last_step


def check_checkpoint(
    checkpoint: Path, config: TrainConfig, last_step: int | None, inputs: Inputs | None = None
) -> None:
    """Check that a run with this config, which ends at `last_step`, can continue from a checkpoint.

    Raises:
        ConfigError: it changes what a resume cannot change.
    """
    manifest, place = read_manifest(checkpoint), str(checkpoint)
    if manifest.config is not None:  # earlier versions recorded none
        _refuse(why_refused(place, manifest.config, config))
        if inputs is not None:
            check_inputs(place, Inputs(manifest.data, manifest.weights), inputs)
    if last_step is not None:
        _refuse(why_too_short(place, manifest.step, config, last_step))


def check_inputs(place: str, then: Inputs, now: Inputs) -> None:
    """Check that a run reads the rows and the weights that it read before.

    Raises:
        ConfigError: they are others.
    """
    added, removed = now.weights.keys() - then.weights.keys(), then.weights.keys() - now.weights.keys()
    if then.weights and (added or removed):  # the reference; the base model is always there
        was, name = ("none" if added else "one"), next(iter(added | removed))
        raise ConfigError(f"{name}: there was {was} in the training of {place}. Restore that, {ANEW}")
    check_weights(place, then.weights, now.weights)
    if then.rows != now.rows:
        raise ConfigError(
            f"data.path: the rows, or how they are tokenized, have changed since the training of {place} "
            "(the files, the tokenizer and the template count, also TRL's training template). Restore them, "
            f"{ANEW}"
        )


def check_weights(place: str, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that models are those of before, from the keys of their weights.

    Raises:
        ConfigError: a model is another one.
    """
    for name, key in now.items():
        if then.get(name, key) != key:
            raise ConfigError(
                f"{name}: it is not the model of the training of {place}: its config or its weights have "
                f"changed. Restore it, {ANEW}"
            )


def model_folders(config: TrainConfig) -> list[str]:
    """Return the models of a config that are folders, as the config names them."""
    return [model for model in (config.model, config.model_ref) if model and Path(model).is_dir()]


def check_model_folders(folder: Path, config: TrainConfig) -> None:
    """Refuse a model that was a folder at the last start and is gone: the hub may have one of this name.

    Raises:
        ConfigError: the folder is gone.
    """
    then = (read_record(folder) or {}).get(MODEL_FOLDERS) if config.resume else None
    for key, model in (("base_model", config.model), ("model_ref", config.model_ref)):
        if model is not None and model in (then or ()) and not Path(model).is_dir():
            raise ConfigError(
                f"{key}: the folder {model} is gone since the last start. Restore it, or start without "
                "--resume to use the model of this name on the hub."
            )


def _refuse(why: str | None) -> None:
    if why is not None:
        raise ConfigError(why)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what run.json records, or None if it is missing or malformed."""
    record = recorded(folder)
    try:
        return record if isinstance(trained_config(record), dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def trained_config(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the config that run.json records."""
    return {name: entry["value"] for name, entry in record["config"].items()}


def update_record(folder: Path, settings: Settings, record: dict[str, Any], merged: bool) -> dict[str, Any]:
    """Write run.json of a finished run again, with the new values of what it still uses.

    All else describes its training, and stays. Returns what it records.
    """
    kept = {*FIXED, *settled(merged)}
    still = {name: entry for name, entry in settings.listed().items() if name not in kept}
    record = {**record, "config": {**record["config"], **still}}
    run_files.write(folder, RECORD, json.dumps(record, indent=2) + "\n")
    return record
