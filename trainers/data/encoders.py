"""Turn rows of the user's file into samples, and mark the rows that are dropped.

config/kinds.py has the columns of each kind of sample. A malformed row raises an error that names it. A row
from which the model cannot learn is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainers.config.schema import TrainConfig
from trainers.data.columns import Columns
from trainers.data.language_rows import LanguageRows
from trainers.data.preference_rows import PreferenceRows
from trainers.data.samples import COUNTS, NUMBER, Dropped, RowError, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """An encoder for `datasets.map`: a batch of rows becomes a batch of samples."""

    def __init__(self, columns: Columns, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        language = LanguageRows(columns, config, tokenizer)
        preference = PreferenceRows(columns, config, tokenizer)
        self.empty = language.empty
        self.encode: Callable[[dict[str, Any]], list[Sample]] = {
            "text": language.language,
            "masked": language.masked,
            "scored_pair": preference.compared,
            "prompted_pair": preference.preferred,
            "labelled": preference.wanted,
        }[config.kind.rows]

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        samples: list[Sample] = []
        rows: list[int] = []
        for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
            try:
                found = self.samples(dict(zip(names, values, strict=True)))
            except RowError as error:
                error.args = (str(error), number)
                raise
            samples += found
            rows += [number] * len(found)
        out = {name: [sample.tokens[name] for sample in samples] for name in self.empty}
        counts = {name: [getattr(sample, name) for sample in samples] for name in COUNTS}
        return {**out, **counts, NUMBER: rows}

    def samples(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row. A row that is dropped gives a sample without tokens, with the reason.

        Raises:
            RowError: the row is malformed.
        """
        try:
            return self.encode(row)
        except Dropped as reason:
            return [Sample(self.empty, 0, 0, dropped=str(reason))]
