"""Preflight: everything that can be checked about a run before a rank starts. Writes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from launcher.config import Run
from launcher.plan.disk import check_disk
from launcher.plan.memory import size_of_model
from trainers.config.errors import ConfigError
from trainers.config.mix import sources_of
from trainers.config.schema import TrainConfig
from trainers.data.columns import check_split
from trainers.data.files import find_split
from trainers.storage.resumed import check_model_folders, check_resume
from trainers.storage.run_folder import check_free
from trainers.storage.run_place import Input, check_place
from trainers.storage.saved_model import ADAPTER

_HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b")  # as huggingface_hub checks it


def preflight(run: Run, others: Sequence[Input] = ()) -> None:
    """Check the model, the data, the upload, the disk and the run's folder. `others`: see check_place().

    Raises:
        ConfigError: the first problem that would stop the run.
        OSError: the disk has no room for what the run will write.
    """
    check_model_folders(run.folder, run.train)
    check_model(run.train)
    check_data(run.train)
    check_hub(run.train)
    check_place(run.folder, run.train, run.config_path, others)
    check_free(run.folder, run.train, run.config_path)
    check_resume(run.folder, run.train)
    check_disk(run.folder, run.train)


def check_model(train: TrainConfig) -> None:
    """Check that a local model folder has a config and weights, and that a path is not read as a hub id."""
    folder = Path(train.model)
    if not folder.is_dir():
        if train.model.startswith((".", "/", "~")) or train.model.count("/") > 1:
            raise ConfigError(
                f"base_model: the folder {train.model} does not exist. Give a model folder, or a hub id."
            )
        if not _HUB_ID.fullmatch(train.model):
            raise ConfigError(
                f"base_model: there is no folder {train.model}, and it is not a valid hub id: letters, "
                "digits, '.', '_' and '-', at most 96 of them in the name."
            )
        return
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"base_model: {folder} is an adapter. Give the merged model (merge_adapter writes it), or the "
            "adapter's base model."
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"base_model: {folder} has no config.json, so it is not a model folder.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"base_model: {folder} has no weights. Expected *.safetensors or pytorch_model*.bin."
        )
    size_of_model(train.model)  # raises if a *.safetensors file has another format


def check_hub(train: TrainConfig) -> None:
    """Check that an upload at the end of the run is possible, as far as this is known without the hub."""
    if not train.push_to_hub:
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(
            "push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or set push_to_hub: "
            "false."
        )
    name = f"{train.username}/{Path(train.project_name).name}"
    if not re.fullmatch(r"\w[\w.-]*/\w([\w.-]{0,94}\w)?", name) or "--" in name or ".." in name:
        raise ConfigError(
            f"push_to_hub: {name} is not a valid repository name. Allowed in username and project_name: "
            "letters, digits, '.', '_' and '-', but not '--' or '..'; in project_name at most 96 characters."
        )


def check_data(train: TrainConfig) -> None:
    """Check that the splits exist, and that their rows have the columns that the config names."""
    if train.mix is not None:
        for source in sources_of(train):
            with source.named():
                _check_splits(source.config, source.trains)
        return
    if "data_path" not in train.model_fields_set and not Path(train.data_path).exists():
        raise ConfigError(
            "data.path: it is missing. Give a folder, a file, or a dataset id (flag --data-path)."
        )
    _check_splits(train)


def _check_splits(train: TrainConfig, trains: bool = True) -> None:
    fractions = train.valid_fraction + train.test_fraction
    for key, name in (
        ("train_split", train.train_split if trains or fractions else None),
        ("valid_split", train.valid_split),
        ("test_split", train.test_split),
    ):
        if name is not None:
            check_split(find_split(train.data_path, name, key), train, key)
