"""What a row of the user's file becomes: a sample, a dropped row, or an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainers.config.errors import ConfigError

# Columns next to the tokens, for the summary.
COUNTS = ("length", "supervised", "truncated", "dropped", "notes")
NUMBER = "row"  # another one: the number of the sample's row in its split, from 0


class Dropped(Exception):
    """A row from which the model cannot learn. The text is the reason, under which it is counted."""


@dataclass
class Sample:
    """An encoded row: the columns of the trainer, and what the summary counts."""

    tokens: dict[str, Any]
    length: int  # in tokens, before it was cut
    supervised: int  # tokens that the loss sees
    truncated: bool = False
    dropped: str = ""
    notes: list[str] = field(default_factory=list)  # what is counted about it, and is no reason to drop it


class RowError(ConfigError):
    """A malformed row, which the user must fix. The caller adds the file and the number of the row."""
