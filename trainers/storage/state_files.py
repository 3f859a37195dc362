"""Read the files in which a run keeps its state. A damaged one is named, with its line and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.json_text import parse_json


def read_text(path: Path, remedy: str) -> str:
    """Return the text of a state file. `remedy` says what the user can do if it is damaged.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it cannot be read: it is a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damaged(path, error.strerror or str(error), remedy) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise damaged(path, f"line {line} is not UTF-8", remedy) from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a state file.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is damaged.
    """
    try:
        value = parse_json(read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise damaged(path, f"line {error.lineno} is not JSON ({error.msg})", remedy) from None
    if not isinstance(value, dict):
        raise damaged(path, "it does not hold a JSON object", remedy)
    return value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the JSON objects in a file with one a line, and the numbers of the lines that hold none.

    A last line without an end is of a process that was killed while it wrote it, and is not counted.
    """
    found, bad = [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line.decode("utf-8"))
        except ValueError:
            value = None
        if isinstance(value, dict) and line.endswith(b"\n"):
            found.append(value)
        elif line.endswith(b"\n"):
            bad.append(number)
    return found, bad


def damaged(path: Path, why: str, remedy: str) -> ConfigError:
    """Return the error for a state file that cannot be used."""
    return ConfigError(f"{path} is damaged: {why}. {remedy}")
