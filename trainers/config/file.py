"""Read a config file: YAML with line numbers, AutoTrain's sections, `${VAR}`, the source of each value.

Both packages read the same file: the launcher for `phalanx train`, a rank for
`accelerate launch ... -m trainers.sft config.yaml`. So this module imports only yaml and pydantic.

    task: llm-sft            -> trainer: sft          data.path          -> data_path
    base_model: gpt2         -> model: gpt2           column_mapping.*   -> text_column, ...
    params.*                 -> by name               hub.*              -> username, token, push_to_hub
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.names import (
    ALIASES,
    COLUMN_ALIASES,
    COLUMN_KEYS,
    DATA_KEYS,
    HUB_KEYS,
    LAUNCHER_SECTIONS,
    SECTIONS,
    SWITCHES,
    TASKS,
    TOP_KEYS,
)
from trainers.config.redaction import remember, remember_tree
from trainers.config.schema import SECRET_FIELDS, TrainConfig
from trainers.config.settings import Settings, resolve
from trainers.config.values import Value, nearest, put
from trainers.config.yaml_file import expand, load_yaml


@dataclass
class FileValues:
    """The values of a config file: fields of TrainConfig, and the sections that only the launcher reads."""

    train: dict[str, Value] = field(default_factory=dict)
    launcher: dict[str, dict[str, Value]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_config_file(path: Path, environ: Mapping[str, str] = os.environ) -> FileValues:
    """Read a config in AutoTrain's form into flat fields.

    Raises:
        ConfigError: something in the file is not allowed; the message has its line.
    """
    tree, lines = load_yaml(path)
    if set(tree) == {"config", "sources", "notes"}:  # an effective config that the launcher wrote
        sources = tree["sources"]
        chosen = {k: Value(v, sources[k], k) for k, v in tree["config"].items() if sources[k] != "default"}
        return FileValues(train=chosen, notes=tree["notes"])
    remember_tree(tree)
    reader = _Reader(path, lines, environ)
    return reader.read(tree)


class _Reader:
    """A reader of one config file, which keeps the path and the line numbers for messages."""

    def __init__(self, path: Path, lines: dict[tuple[str, ...], int], environ: Mapping[str, str]) -> None:
        self.path, self.lines, self.environ = path, lines, environ
        self.out = FileValues()

    def where(self, *keys: str) -> str:
        return f"{self.path}:{self.lines.get(keys, 1)}"

    def section(self, tree: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        value = tree.get(keys[-1])
        if value is None:
            return {}
        if not isinstance(value, dict):
            kind = "a list" if isinstance(value, list) else "one value"  # which may be a secret of any form
            raise ConfigError(f"{self.where(*keys)}: {'.'.join(keys)} must be a mapping of keys, not {kind}.")
        return value

    def put(self, name: str, value: Any, *keys: str, optional: bool = False) -> None:
        """Store one field. It is an error if two names set one field to different values."""
        where = self.where(*keys)
        value, read = expand(value, where, self.environ, optional)
        if name in SECRET_FIELDS:
            remember(value)
        inside = {
            path[len(keys) :]: f"{self.path}:{line}"
            for path, line in self.lines.items()
            if isinstance(value, list) and path[: len(keys)] == keys != path
        }
        put(self.out.train, name, Value(value, where + read, ".".join(keys), places=inside))

    def unknown(self, valid: Iterable[str], *keys: str) -> ConfigError:
        valid = list(valid)
        hint = nearest(keys[-1], valid)
        # The most common mistake is a parameter that is one level too high.
        if len(keys) == 1 and keys[0] in (*TrainConfig.model_fields, *ALIASES, *SWITCHES):
            hint = "It belongs under 'params:'."
        return ConfigError(f"{self.where(*keys)}: unknown key '{'.'.join(keys)}'. {hint}")

    def read(self, tree: Mapping[str, Any]) -> FileValues:
        for key in tree:
            if key not in SECTIONS:
                raise self.unknown(SECTIONS, key)
        self.read_task(tree)
        backend = tree.get("backend", "local")
        if not str(backend).startswith("local"):
            raise ConfigError(
                f"{self.where('backend')}: backend: {backend} is a service of AutoTrain, which Phalanx "
                "does not have. Allowed: local. On a cluster: sbatch slurm/train.sh config.yaml."
            )
        for key, name in TOP_KEYS.items():
            if key in tree:
                self.put(name, tree[key], key)
        self.read_data(self.section(tree, "data"))
        hub = self.section(tree, "hub")
        for key, value in hub.items():
            if key not in HUB_KEYS:
                raise self.unknown(HUB_KEYS, "hub", key)
            self.put(key, value, "hub", key, optional=True)
        valid = (*TrainConfig.model_fields, *ALIASES, *SWITCHES)
        for key, value in self.section(tree, "params").items():
            if key not in valid:
                raise self.unknown(valid, "params", key)
            self.put(key, value, "params", key)
        for name in LAUNCHER_SECTIONS:
            self.out.launcher[name] = {}
            for key, value in self.section(tree, name).items():
                where = self.where(name, key)
                value, read = expand(value, where, self.environ)
                self.out.launcher[name][key] = Value(value, where + read, f"{name}.{key}")
        return self.out

    def read_task(self, tree: Mapping[str, Any]) -> None:
        if "task" not in tree:
            raise ConfigError(f"{self.path}: the key 'task' is missing. Write for example task: llm-sft.")
        task = str(tree["task"]).replace("llm:", "llm-")
        if task not in TASKS:
            raise ConfigError(
                f"{self.where('task')}: task '{tree['task']}' does not exist. Allowed: {', '.join(TASKS)}."
            )
        if "-" in task:
            trainer = task.split("-", 1)[1].replace("generic", "default")
            self.put("trainer", trainer, "task")

    def read_data(self, data: Mapping[str, Any]) -> None:
        for key, value in data.items():
            if key in DATA_KEYS:
                self.put(DATA_KEYS[key], value, "data", key)
            elif key != "column_mapping":
                raise self.unknown((*DATA_KEYS, "column_mapping"), "data", key)
        for key, value in self.section(data, "data", "column_mapping").items():
            name = COLUMN_ALIASES.get(key, key)
            if name not in COLUMN_KEYS:
                raise self.unknown(COLUMN_KEYS, "data", "column_mapping", key)
            self.put(name, value, "data", "column_mapping", key)


def load_settings(path: Path) -> Settings:
    """Read a config file and resolve it to the effective config, in a rank."""
    read = read_config_file(path)
    settings = resolve(read.train)
    settings.notes = list(dict.fromkeys(read.notes + settings.notes))
    return settings


def effective_text(settings: Settings) -> str:
    """Return the effective config, without secrets, as the text of a file that load_settings can read."""
    record = {"config": settings.public(), "sources": settings.sources, "notes": settings.notes}
    return json.dumps(record, indent=2) + "\n"
