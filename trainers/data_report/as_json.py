"""Print rows as JSON, one object a line, for programs: exactly what training gets, and nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trainers.data.preview import decoded
from trainers.data_report.gather import Look
from trainers.data_report.shown_rows import ShownRow
from trainers.data_report.view import View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class JsonView(View):
    """Prints an object for each row. Text that is not ASCII is escaped, so any reader and locale will do."""

    counts = False
    source = ""

    def head(self, look: Look) -> None:
        self.source = look.name

    def row(self, row: ShownRow, tokenizer: PreTrainedTokenizerBase) -> None:
        print(json.dumps(as_json(row, tokenizer, self.source)), file=self.stdout)


def as_json(row: ShownRow, tokenizer: PreTrainedTokenizerBase, source: str = "") -> dict[str, Any]:
    """Return a row as JSON types: its number, and its samples, why it is dropped, or its error.

    `source`: its source in a mix.
    """
    found: dict[str, Any] = {"row": row.number}
    if source:
        found["source"] = source
    if row.file is not None:
        found["file"] = str(row.file)
    if row.error:
        return found | {"error": row.error}
    if row.samples:
        found["samples"] = [_with_text(sample, tokenizer) for sample in row.samples]
    return found | ({"dropped": row.dropped} if row.dropped else {})


def _with_text(sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a sample with its texts: `text` of input_ids, `chosen` of chosen_ids, and so on."""
    texts = {
        "text" if name == "input_ids" else name.removesuffix("_ids"): decoded(ids, tokenizer)
        for name, ids in sample.items()
        if name.endswith("_ids")
    }
    return {**texts, **sample}
