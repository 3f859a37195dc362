"""Give the values of a row as the user's file has them.

Arrow gives all values of a column one type: the objects of a column get the same keys in the same order, a
key that a row does not have becomes null, 40 becomes 40.0 next to 2.5, a text that looks like a date becomes
a date, and a key that is new after the first part of a file is an error. So the rows of JSON files are kept
as text, and parsed when they are read. In Parquet files and on the hub the nulls are in the data already, and
are removed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.data.files import Split, parse_row, rows

if TYPE_CHECKING:
    from datasets import Dataset, Features

LINE = "text"  # the column of `datasets`' text builder
LATE = ("tools", "chat_template_kwargs")  # columns that only later rows may have


@dataclass(frozen=True)
class Lines:
    """A transform for rows of JSON text: a batch of lines becomes a batch of columns."""

    split: Split
    names: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        others = {name: values for name, values in batch.items() if name != LINE}
        try:
            parsed = [parse_row(line) for line in batch[LINE]]
        except ValueError as error:
            for _ in rows(self.split):  # raises an error with file and line
                pass
            raise ConfigError(f"data.path: {self.split.path}: a row cannot be read: {error}.") from None
        return {name: [row.get(name) for row in parsed] for name in self.names} | others


@dataclass(frozen=True)
class Structs:
    """A transform that removes keys that are null from the objects of some columns."""

    features: dict[str, Any]  # of the columns that have objects

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            name: [without_filled(value, self.features[name]) for value in values]
            if name in self.features
            else values
            for name, values in batch.items()
        }


def exact_lines(raw: Dataset, split: Split, names: list[str]) -> Dataset:
    """Return rows of JSON text as rows with columns."""
    late = [name for name in LATE if name not in names]
    return raw.with_transform(Lines(split, (*names, *late)))


def exact_structs(raw: Dataset) -> Dataset:
    """Return rows with typed columns without the nulls that the types added."""
    found = {name: feature for name, feature in raw.features.items() if _has_struct(feature)}
    return raw.with_transform(Structs(found)) if found else raw


def without_filled(value: Any, feature: Any) -> Any:
    """Remove the keys that are null from objects that have a type, at any depth.

    Such a key may have been null in the row, or missing. Objects of the type Json are as they were.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: without_filled(part, feature[key]) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_filled(part, feature.feature) for part in value]
    return value


def _has_struct(feature: Features | Any) -> bool:
    return isinstance(feature, dict) or (hasattr(feature, "feature") and _has_struct(feature.feature))
