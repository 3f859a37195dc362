"""Where a run's folder may be: apart from all that the run reads, and from the user's own folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.field_types import TEMPLATE_FILE
from trainers.config.hub_paths import datasets_cache, hub_cache, hub_home, token_file
from trainers.config.mix import keys_of, sources_of
from trainers.config.names import DATA_KEYS
from trainers.config.schema import INPUT_FIELDS, TrainConfig
from trainers.rank.protocol import CACHE
from trainers.storage import run_files
from trainers.storage.data_cache import cache_folder
from trainers.storage.manifest import CHECKPOINT_PREFIX, is_checkpoint
from trainers.storage.places import Place
from trainers.storage.run_files import is_name_of_run
from trainers.storage.run_folder import holds_run, owner_of

_KEYS = {field: f"data.{key}" for key, field in DATA_KEYS.items()} | {"model": "base_model"}


@dataclass(frozen=True)
class Input:
    """A file or a folder that a run reads, and what the user calls it."""

    name: str
    path: Path
    may_contain: bool = False  # whether the run's folder may be inside, if the working folder is too


def check_place(
    folder: Path, config: TrainConfig, config_file: Path | None = None, others: Sequence[Input] = ()
) -> None:
    """Refuse a run's folder that is, contains, or lies inside something that the run reads, or another run.

    Links are resolved, and bind mounts are known. The config file may be in the folder, under a name that no
    run writes. A run may resume from its own checkpoint. `others` are inputs that the config does not name.

    Raises:
        ConfigError: the folder is refused; the message names what it would destroy.
    """
    run = Place.of(folder)
    own = {"working": Path.cwd(), "home": Path(os.path.expanduser("~"))}
    for name, path in own.items():
        place = Place.of(path)
        if run.is_same(place) or run.contains(place):
            raise ConfigError(
                f"project_name: {folder} is the {name} folder {path}, or contains it. Give a folder of its "
                "own, for example my-run."
            )
    for read in (*_inputs(config), *others):
        if relation := _relation(run, read):
            raise ConfigError(
                f"project_name: {folder} {relation} {read.name} ({read.path}), which this run reads. The run "
                "would write over it or delete it. Give another project_name."
            )
    if outer := owner_of(folder):
        raise ConfigError(
            f"project_name: {folder} lies inside {outer}, which belongs to another run. That run may delete "
            "it. Give another project_name, next to that run."
        )
    for place in _where(config_file) if config_file else ():
        if (inside := run.name_inside(place)) and is_name_of_run(inside):
            raise ConfigError(
                f"project_name: {folder} contains the config file {config_file}, under a name that runs "
                "write. Rename the config file, for example to config.yaml, or give another project_name."
            )


def check_output(output: Path) -> None:
    """Refuse a place for the output of another command that belongs to a run or to a checkpoint.

    A folder of its own inside a run's folder is accepted: --overwrite keeps it.

    Raises:
        ConfigError: the place is refused; the message names whose it is.
    """
    place = output.resolve()
    for folder in (place, *place.parents):
        if is_checkpoint(folder):
            raise ConfigError(f"{output} is inside the checkpoint {folder}. Give another folder.")
        if folder == place or not (run_files.recorded(folder) is not None or holds_run(folder)):
            continue
        name = place.relative_to(folder).as_posix()
        if is_name_of_run(name) or run_files.owns(folder, name):
            raise ConfigError(
                f"{output} belongs to the run in {folder}, which writes there. Give another folder."
            )


def _relation(run: Place, read: Input) -> str | None:
    """Return how a run's folder overlaps with an input, or None if they are apart."""
    here = Place(Path.cwd())
    for place in _where(read.path):
        if run.is_same(place):
            return "is"
        if run.contains(place):
            return "contains"
        if place.contains(run) and not (read.may_contain and (place.is_same(here) or place.contains(here))):
            return "lies inside"
    if read.path.is_dir():
        with os.scandir(read.path) as entries:
            leads_to = [Place.of(Path(entry.path)) for entry in entries if entry.is_symlink()]
        if any(run.is_same(place) or run.contains(place) for place in leads_to):
            return "contains files of"
    return None


def _where(path: Path) -> tuple[Place, Place]:
    """Return where a path is, and where it leads to if it is a link."""
    return Place(path.absolute().parent.resolve() / path.name), Place.of(path)


def _named(config: TrainConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield what the user calls each input, its field, and its value."""
    sources = sources_of(config)
    for field in INPUT_FIELDS:
        if field != "mix" and not (sources and field == "data_path"):
            yield _KEYS.get(field, field), field, getattr(config, field)
    for source in sources:
        for field in ("data_path", "chat_template"):
            yield f"{source.key}.{'.'.join(keys_of(field))}", field, getattr(source.config, field)


def _inputs(config: TrainConfig) -> Iterator[Input]:
    """Yield what a config makes a run read: also a hub id that is the run's own name.

    Libraries look for a folder before they ask the hub. So the run's folder would be taken for that model.
    """
    run = Place.of(Path(config.project_name))
    for name, field, value in _named(config):
        if not isinstance(value, str) or (field == "chat_template" and not value.endswith(TEMPLATE_FILE)):
            continue
        path = Path(os.path.expanduser(value))
        own = path.name.startswith(CHECKPOINT_PREFIX) and run.is_same(Place.of(path.parent))
        if field == "resume" and own:
            continue
        if path.exists() or run.is_same(Place.of(path)):
            yield Input(name, path)
    yield Input(f"the cache of prepared data, {CACHE}", cache_folder(), may_contain=True)
    yield Input(f"the cache of prepared data, {CACHE}", cache_folder() / "data")
    yield Input("Hugging Face's folder, HF_HOME", hub_home(), may_contain=True)
    yield Input("the cache of models, HF_HUB_CACHE", hub_cache())
    yield Input("the cache of data, HF_DATASETS_CACHE", datasets_cache())
    yield Input("the hub's token, HF_TOKEN_PATH", token_file())
