"""What a row of the user's file becomes, and the ways in which it may not become anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainers.config.errors import ConfigError

COUNTS = ("length", "supervised", "truncated", "dropped")  # columns beside the tokens, for the summary


class Dropped(Exception):
    """A row that teaches nothing; its text is the reason that is counted."""


@dataclass
class Sample:
    """What one row becomes: the trainer's columns, and what the summary counts."""

    tokens: dict[str, Any]
    length: int  # tokens of the whole row, before it was cut
    supervised: int  # tokens that the loss sees
    truncated: bool = False
    dropped: str = ""


class RowError(ConfigError):
    """A row that cannot be used, and that the user should look at; the caller adds where it lies."""
