"""Packing: several documents fill one block, and none sees another.

    input_ids      [ a a a | b b | c c c c ]
    position_ids     0 1 2   0 1   0 1 2 3     they restart, so attention stays inside each document

The collator of TRL flattens a batch and derives position_ids from seq_lengths, without an attention mask;
that is what isolates the documents in transformers' attention functions.

    bfd      whole documents, best-fit-decreasing; a block is as full as they fit
    wrapped  documents in their order, cut where a block is full; only the last block is shorter
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1_000_000  # rows that are packed at a time; arrow's lists end at 2^31 tokens


def pack(rows: Dataset, block_size: int, how: str) -> Dataset:
    """Rows of `input_ids` and `labels` -> blocks of up to `block_size` tokens + `seq_lengths`.

    With `none`, the rows as they are.
    """
    if how == "bfd":
        from trl.data_utils import pack_dataset

        return pack_dataset(rows, block_size, "bfd", {"batch_size": min(len(rows), BATCH)})
    if how == "wrapped":
        return rows.map(
            _Wrapper(len(rows), block_size), batched=True, with_indices=True, remove_columns=rows.column_names
        )
    return rows


class _Wrapper:
    """Joins documents and cuts full blocks, batch by batch; what is left over waits for the next batch."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total, self.block_size = total, block_size
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.lengths: list[int] = []

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        if numbers[0] == 0:
            self.ids, self.labels, self.lengths = [], [], []
        blocks: list[dict[str, list[int]]] = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            blocks += self._add(ids, labels)
        if numbers[-1] == self.total - 1 and self.ids:
            blocks.append(self._take())
        return {name: [block[name] for block in blocks] for name in ("input_ids", "labels", "seq_lengths")}

    def _add(self, ids: list[int], labels: list[int]) -> Iterator[dict[str, list[int]]]:
        start = 0
        while start < len(ids):
            end = min(len(ids), start + self.block_size - len(self.ids))
            self.ids += ids[start:end]
            self.labels += labels[start:end]
            self.lengths.append(end - start)
            start = end
            if len(self.ids) == self.block_size:
                yield self._take()

    def _take(self) -> dict[str, list[int]]:
        block = {"input_ids": self.ids, "labels": self.labels, "seq_lengths": self.lengths}
        self.ids, self.labels, self.lengths = [], [], []
        return block
