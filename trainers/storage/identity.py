"""The id of a run: in its run.json, and in the manifest of each checkpoint that it writes.

A checkpoint that was copied from the folder of another run has another id. Earlier versions wrote none.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from trainers.config.json_text import parse_json

RECORD = "run.json"
ID = "id"  # the key of run.json


def new_id() -> str:
    """Return an id that no other run has."""
    return uuid.uuid4().hex


def recorded(folder: Path) -> dict[str, Any]:
    """Return what run.json in a folder has, or nothing if it is missing or malformed."""
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def recorded_id(folder: Path) -> str:
    """Return the id that run.json in a folder records, or an empty string if there is none."""
    found = recorded(folder).get(ID)
    return found if isinstance(found, str) else ""
