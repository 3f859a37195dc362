"""Packing: several documents fill one block, and none sees another.

    input_ids      [ a a a | b b | c c c c ]
    position_ids     0 1 2   0 1   0 1 2 3     they restart, so attention stays inside each document

The collator of TRL flattens a batch and derives position_ids from seq_lengths, without an attention mask;
that is what isolates the documents in transformers' attention functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def pack(rows: Dataset, block_size: int) -> Dataset:
    """Best-fit-decreasing.

    Rows of `input_ids` and `labels` -> blocks of up to `block_size` tokens + `seq_lengths`.
    """
    from trl.data_utils import pack_dataset

    return pack_dataset(rows, block_size, "bfd", {"batch_size": len(rows)})
