"""Reading a config file: YAML with line numbers, AutoTrain's sections, `${VAR}`, the source of each value.

Both packages read the same file: the launcher for `phalanx train`, a rank for
`accelerate launch ... -m trainers.sft config.yaml`. Light on purpose: yaml and pydantic, nothing else.

    task: llm-sft            -> trainer: sft          data.path          -> data_path
    base_model: gpt2         -> model: gpt2           column_mapping.*   -> text_column, ...
    params.*                 -> by name               hub.*              -> username, token, push_to_hub
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

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
from trainers.config.schema import TRAINERS, TrainConfig
from trainers.config.settings import Settings, Value, nearest, put, resolve

DEEPEST = 5  # levels of a config, lists counted; an effective config has the most

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass
class FileValues:
    """What a config file says: fields of TrainConfig, and the sections that only the launcher reads."""

    train: dict[str, Value] = field(default_factory=dict)
    launcher: dict[str, dict[str, Value]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- YAML


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Reads a YAML mapping.

    Returns the tree and the line (from 1) of each key, by its path, such as ("data", "path").

    Raises:
        ConfigError: no such file, not YAML, empty, not a mapping, or a key given twice.
    """
    if str(path).startswith(("http://", "https://", "http:/", "https:/")):
        raise ConfigError(f"{path}: a remote config is not read. Download it, look at it, and give its path.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give the path of a config, for example examples/demo.yaml."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder. Give the path of a config file in it.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(
                f"{path}: the file is empty. It needs at least task, base_model, project_name and data."
            )
        if not isinstance(node, yaml.MappingNode):
            kind, line = type(node).__name__.removesuffix("Node").lower(), node.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: a mapping of keys is needed, not a {kind}.")
        lines: dict[tuple[str, ...], int] = {}
        tree = _build(loader, node, (), lines, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    finally:
        loader.dispose()
    return tree, lines


def _build(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    keys: tuple[str, ...],
    lines: dict[tuple[str, ...], int],
    path: Path,
    depth: int = 0,
) -> Any:
    line = node.start_mark.line + 1
    if depth == DEEPEST:  # an alias of itself has no end
        raise ConfigError(f"{path}:{line}: nested deeper than any key of a config.")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{path}:{line}: a key must be a word, not a {key_node.id}.")
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"{path}:{line}: merge keys (<<) are not read. Write the keys out.")
            if key in result:
                first = lines[(*keys, key)]
                raise ConfigError(f"{path}:{line}: '{key}' is given twice (first in line {first}). Keep one.")
            lines[(*keys, key)] = line
            result[key] = _build(loader, value_node, (*keys, key), lines, path, depth + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, keys, lines, path, depth + 1) for item in node.value]
    try:
        return loader.construct_object(node)
    except ValueError as error:  # a date or a number that is none, such as 2024-13-45
        raise ConfigError(f"{path}:{line}: {node.value} is not a value: {error}. Put it in quotes.") from None


def expand(value: Any, where: str, optional: bool = False) -> tuple[Any, str]:
    """Replaces `${VAR}` in a string, and tells which variables were read.

    `optional`: a string that is one unset variable becomes None (AutoTrain's hub section works so).
    """
    if isinstance(value, list):
        return [expand(item, where)[0] for item in value], ""
    if not isinstance(value, str):
        return value, ""
    names = _VARIABLE.findall(value)
    for name in names:
        if name not in os.environ:
            if optional and value == f"${{{name}}}":
                return None, f" (${{{name}}}, not set)"
            raise ConfigError(
                f"{where}: the environment variable {name} is not set. Export it, or write the value."
            )
    text = _VARIABLE.sub(lambda match: os.environ[match.group(1)], value)
    return text, f" ({', '.join('${' + n + '}' for n in names)})" if names else ""


# ---------------------------------------------------------------------------- AutoTrain's form


def read_config_file(path: Path) -> FileValues:
    """Reads a config in AutoTrain's form into flat fields.

    Raises:
        ConfigError: anything in the file that is not allowed, with its line.
    """
    tree, lines = load_yaml(path)
    if set(tree) == {"config", "sources", "notes"}:  # an effective config that the launcher wrote
        sources = tree["sources"]
        chosen = {k: Value(v, sources[k], k) for k, v in tree["config"].items() if sources[k] != "default"}
        return FileValues(train=chosen, notes=tree["notes"])
    reader = _Reader(path, lines)
    return reader.read(tree)


class _Reader:
    """Walks one config file; keeps the path and line numbers for messages."""

    def __init__(self, path: Path, lines: dict[tuple[str, ...], int]) -> None:
        self.path, self.lines = path, lines
        self.out = FileValues()

    def where(self, *keys: str) -> str:
        return f"{self.path}:{self.lines.get(keys, 1)}"

    def section(self, tree: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        value = tree.get(keys[-1])
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConfigError(
                f"{self.where(*keys)}: {'.'.join(keys)} must be a mapping of keys, not {value!r}."
            )
        return value

    def put(self, name: str, value: Any, *keys: str, optional: bool = False) -> None:
        """Stores one field; the same field by two names with two values is an error."""
        where = self.where(*keys)
        value, read = expand(value, where, optional)
        put(self.out.train, name, Value(value, where + read, ".".join(keys)))

    def unknown(self, valid: Iterable[str], *keys: str) -> ConfigError:
        valid = list(valid)
        hint = nearest(keys[-1], valid)
        # A parameter that stands one level too high is the most common slip.
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
                f"{self.where('backend')}: backend: {backend} is a service of AutoTrain's that this project "
                "does not offer. Allowed: local. Clusters: sbatch slurm/train.sh config.yaml."
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
                value, read = expand(value, where)
                self.out.launcher[name][key] = Value(value, where + read, f"{name}.{key}")
        return self.out

    def read_task(self, tree: Mapping[str, Any]) -> None:
        if "task" not in tree:
            raise ConfigError(f"{self.path}: the key 'task' is missing. Write for example task: llm-sft.")
        task = str(tree["task"]).replace("llm:", "llm-")
        if task not in TASKS:
            raise ConfigError(
                f"{self.where('task')}: task '{tree['task']}' does not exist here. Allowed: "
                f"{', '.join(TASKS)}."
            )
        if "-" in task:
            trainer = task.split("-", 1)[1].replace("generic", "default")
            assert trainer in TRAINERS
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


# ------------------------------------------------------------------------------- the effective config


def load_settings(path: Path) -> Settings:
    """What a rank started by hand does: file -> effective config."""
    read = read_config_file(path)
    settings = resolve(read.train)
    settings.notes = list(dict.fromkeys(read.notes + settings.notes))
    return settings


def write_effective(settings: Settings, path: Path) -> None:
    """Writes the effective config, without secrets, as a file that load_settings reads back."""
    record = {"config": settings.public(), "sources": settings.sources, "notes": settings.notes}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
