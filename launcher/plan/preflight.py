"""Preflight: all that can be known about a run before a rank starts. Writes nothing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from launcher.config import Run
from launcher.plan.memory import predict_disk, size_of_model
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data.columns import check_split
from trainers.data.files import find_split
from trainers.storage.manifest import checkpoint_folders
from trainers.storage.run_folder import check_free
from trainers.storage.sizes import in_words


def preflight(run: Run) -> None:
    """Checks the model, the data and the run's folder.

    Raises:
        ConfigError: the first thing that would stop the run.
    """
    check_model(run.train)
    check_data(run.train)
    check_hub(run.train)
    check_disk(run.folder, run.train)
    check_free(run.folder, run.train)


def check_model(train: TrainConfig) -> None:
    """A local model folder must hold a config and weights; a path must not be mistaken for a hub id."""
    folder = Path(train.model)
    if not folder.is_dir():
        if train.model.startswith((".", "/", "~")) or train.model.count("/") > 1:
            raise ConfigError(
                f"base_model: the folder {train.model} does not exist. Give a model folder, or a hub id."
            )
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"base_model: {folder} holds no config.json, so it is not a model folder.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"base_model: {folder} holds no weights. Expected *.safetensors or pytorch_model*.bin."
        )
    size_of_model(train.model)  # refuses weights that are not what their name says


def check_disk(folder: Path, train: TrainConfig) -> None:
    """The run's file system must have room for a checkpoint and the final model, as predicted."""
    parameters = size_of_model(train.model)
    if parameters is None:
        return
    there = next(part for part in (folder.resolve(), *folder.resolve().parents) if part.is_dir())
    free = shutil.disk_usage(there).free
    if train.overwrite:  # they are deleted first
        free += sum(_size(old) for old in checkpoint_folders(folder))
    checkpoint, model = predict_disk(parameters, train)
    if checkpoint + model > free:
        raise ConfigError(
            f"project_name: a checkpoint of this run takes about {in_words(checkpoint)} and its final model "
            f"{in_words(model)} (predicted), and {there} has {in_words(free)} left. Make room, or give a "
            "project_name on another disk."
        )


def _size(folder: Path) -> int:
    """Bytes of its files; those that another machine of this start deletes meanwhile do not count."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(path, name)).st_size
    return size


def check_hub(train: TrainConfig) -> None:
    """An upload must be possible at the end of the run, as far as can be known without asking the hub."""
    if not train.push_to_hub:
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(
            "push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or push_to_hub: false."
        )
    name = f"{train.username}/{Path(train.project_name).name}"
    if not re.fullmatch(r"\w[\w.-]*/\w([\w.-]{0,94}\w)?", name) or "--" in name or ".." in name:
        raise ConfigError(
            f"push_to_hub: {name} is no name of a repository. Allowed in username and project_name: letters, "
            "digits, '.', '_' and '-', neither '--' nor '..', and at most 96 of them."
        )


def check_data(train: TrainConfig) -> None:
    """Splits that exist and hold rows with the columns that the config names."""
    if "data_path" not in train.model_fields_set and not Path(train.data_path).exists():
        raise ConfigError(
            "data.path: it is missing. Give a folder, a file, or a dataset id (flag --data-path)."
        )
    for key, name in (
        ("train_split", train.train_split),
        ("valid_split", train.valid_split),
        ("test_split", train.test_split),
    ):
        if name is not None:
            check_split(find_split(train.data_path, name, key), train, key)
