"""Decide which columns of a split hold messages: once for the split, and not row by row.

An answer that is JSON (`[]`, or `[{"name": "Bob"}]`) is text like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainers.data.columns import Columns
from trainers.data.messages import is_dialogue, looks_like_messages

ROWS_READ = 1000  # rows that decide


def with_messages(columns: Columns, first: Mapping[str, list[Any]]) -> Columns:
    """Return the columns with the names of those that hold messages. `first` has the first rows."""
    if columns.kind == "tokens":
        return columns
    named = columns.named
    found = [
        name for name in named if _has_messages(first[name], objects=columns.kind in ("pair", "labelled"))
    ]
    # The completion of a prompt that is text is text, whatever it looks like.
    apart = columns.kind in ("completion", "labelled") and (columns.prompt or columns.instruction)
    if apart and columns.prompt not in found and _is_text(first[columns.text]):
        found = [name for name in found if name != columns.text]
    texts = [name for name in named if name not in found]
    alone = columns.kind == "pair" and columns.prompt is None and not columns.instruction
    dialogues = [name for name in texts if alone and _has_dialogues(first[name])]
    return replace(columns, messages=tuple(found), dialogues=tuple(dialogues))


def _has_messages(values: list[Any], objects: bool) -> bool:
    """Return whether most values that are not empty are messages.

    With `objects`, an object is one message.
    """
    given = [
        value for value in values if value is not None and not (isinstance(value, str) and not value.strip())
    ]
    texts = [value for value in given if isinstance(value, str)]
    kinds = (list, dict) if objects else (list,)
    found = sum(isinstance(value, kinds) for value in given)
    if texts and any(text.lstrip().startswith("[") for text in texts[:ROWS_READ]):
        found += sum(looks_like_messages(text) for text in texts)
    return bool(given) and 2 * found >= len(given)


def _has_dialogues(values: list[Any]) -> bool:
    given = [value for value in values if value]
    return bool(given) and 2 * sum(is_dialogue(value) for value in given) >= len(given)


def _is_text(values: list[Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in values)
