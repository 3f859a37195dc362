"""Preflight: all that can be known about a run before a rank starts. Writes nothing."""

from __future__ import annotations

from pathlib import Path

from launcher.config import Run
from launcher.memory import size_of_model
from launcher.topology import Topology
from trainers.config import ConfigError, TrainConfig
from trainers.data_files import check_split, find_split
from trainers.run_folder import check_free


def preflight(run: Run, topology: Topology) -> None:
    """Checks the model, the data and the run's folder.

    Raises:
        ConfigError: the first thing that would stop the run.
    """
    check_model(run.train)
    check_data(run.train)
    if topology.machine_rank == 0:  # the other machines find what machine 0 has just made
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
