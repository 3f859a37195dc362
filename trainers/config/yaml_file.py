"""Read YAML with the line of each key, and replace `${VAR}` in its strings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainers.config.errors import ConfigError
from trainers.config.redaction import has_secret

DEEPEST = 8  # levels of nesting that are allowed, lists included; a source of data.mix has the most
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a YAML mapping.

    Returns the tree, and the line (from 1) of each key and each item of a list by its path, such as ("data",
    "path").

    Raises:
        ConfigError: the file is missing, empty, not YAML or not a mapping, or it has a key twice.
    """
    if str(path).startswith(("http://", "https://", "http:/", "https:/")):
        raise ConfigError(f"{path}: a remote config is not read. Download it, check it, and give its path.")
    if has_secret(str(path)):
        raise ConfigError(
            f"{path}: the name of the config has a secret, and logs and records name it. Rename it."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give the path of a config, for example examples/demo.yaml."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder. Give the path of a config file in it.") from None
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
            raise ConfigError(f"{path}:{line}: the file must be a mapping of keys, not a {kind}.")
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
    if depth == DEEPEST:  # an alias that contains itself never ends
        raise ConfigError(f"{path}:{line}: nested deeper than a config allows.")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{path}:{line}: a key must be text, not a {key_node.id}.")
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"{path}:{line}: merge keys (<<) are not read. Write the keys out.")
            if key in result:
                first = lines[(*keys, key)]
                raise ConfigError(f"{path}:{line}: '{key}' is given twice (first in line {first}). Keep one.")
            lines[(*keys, key)] = line
            result[key] = _build(loader, value_node, (*keys, key), lines, path, depth + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            inside = (*keys, str(number))
            lines[inside] = item.start_mark.line + 1
            items.append(_build(loader, item, inside, lines, path, depth + 1))
        return items
    try:
        return loader.construct_object(node)
    except ValueError as error:  # an invalid date or number, such as 2024-13-45
        raise ConfigError(
            f"{path}:{line}: {node.value} is not a valid value: {error}. Put it in quotes."
        ) from None


def expand(value: Any, where: str, environ: Mapping[str, str], optional: bool = False) -> tuple[Any, str]:
    """Replace `${VAR}` in a string, a list or a mapping.

    Returns the new value, and the variables of a string as text for its source, such as " (${HOME})". With
    `optional`, a string that is only an unset variable becomes None, as in AutoTrain's section `hub`.

    Raises:
        ConfigError: a variable is not set.
    """
    if isinstance(value, list):
        return [expand(item, where, environ)[0] for item in value], ""
    if isinstance(value, dict):
        return {key: expand(item, where, environ)[0] for key, item in value.items()}, ""
    if not isinstance(value, str):
        return value, ""
    names = _VARIABLE.findall(value)
    for name in names:
        if name not in environ:
            if optional and value == f"${{{name}}}":
                return None, f" (${{{name}}}, not set)"
            raise ConfigError(
                f"{where}: the environment variable {name} is not set. Export it, or write the value."
            )
    text = _VARIABLE.sub(lambda match: environ[match.group(1)], value)
    return text, f" ({', '.join('${' + n + '}' for n in names)})" if names else ""
