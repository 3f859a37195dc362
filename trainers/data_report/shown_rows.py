"""Encode the first rows of a part one by one, with the encoder that prepares training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.data.encoders import Encoder
from trainers.data.files import RowPlaces
from trainers.data.loading import ROW
from trainers.data.samples import RowError
from trainers.data.tokens import forget_truncation

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

AT_A_TIME = 100  # rows that are read together


@dataclass(frozen=True)
class ShownRow:
    """A row, and what becomes of it."""

    number: int  # in its file, from 1, as in messages
    file: Path | None  # where the split has several files
    samples: list[dict[str, Any]]
    dropped: str = ""  # why the row, or some of its samples, are dropped
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: row {self.number}" if self.file else f"row {self.number}"


def first_rows(
    raw: Dataset, encoder: Encoder, places: RowPlaces, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Iterator[ShownRow]:
    """Yield the first rows of a part, in the order of the file. `limit` None: all."""
    chosen = raw if limit is None or limit >= len(raw) else raw.select(range(limit))
    several = len(places.split.files) > 1
    try:
        for batch in chosen.iter(AT_A_TIME):
            numbers = batch.pop(ROW)
            for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
                path, place = places.find(int(number))
                row = dict(zip(batch, values, strict=True))
                yield _shown(row, encoder, place, path if several else None)
    finally:
        forget_truncation(tokenizer)


def _shown(row: dict[str, Any], encoder: Encoder, number: int, file: Path | None) -> ShownRow:
    try:
        samples = encoder.samples(row)
    except RowError as error:
        return ShownRow(number, file, [], error=str(error))
    reasons = dict.fromkeys(sample.dropped for sample in samples if sample.dropped)
    kept = [sample.tokens for sample in samples if not sample.dropped]
    return ShownRow(number, file, kept, dropped=", ".join(reasons))
