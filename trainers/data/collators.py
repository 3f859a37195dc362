"""Turn samples into tensors: the pieces of a split, and the flat micro-batch that contains them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.data.labels import IGNORED
from trainers.data.packing import Pieces

if TYPE_CHECKING:
    from datasets import Dataset


class PieceDataset:
    """A torch dataset of the pieces of a split: an index is a piece, not a sample.

    `numbers`: the number of each sample, for a trainer whose loss depends on it (MaskTokens).
    """

    def __init__(self, dataset: Dataset, pieces: Pieces, numbers: Sequence[int] | None = None) -> None:
        self.pieces, self.numbers = pieces, numbers
        self.flat = "labels" in dataset.column_names  # FlatCollator takes arrays; other collators take lists
        self.dataset = dataset.with_format("numpy") if self.flat else dataset

    def __len__(self) -> int:
        return len(self.pieces.sample)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if not indices:
            return []
        pieces = self.pieces
        chosen: list[int] = pieces.sample[indices].tolist()
        samples: list[dict[str, Any]] = self.dataset.__getitems__(chosen)
        if self.numbers is not None:
            samples = [s | {"number": self.numbers[n]} for s, n in zip(samples, chosen, strict=True)]
        for index, sample in zip(indices, samples if self.flat else [], strict=self.flat):
            span = slice(pieces.start[index], pieces.stop[index])
            sample |= {name: sample[name][span] for name in ("input_ids", "labels")}
        return samples


class FlatCollator:
    """A collator that joins pieces into one flat sequence, without padding and without a mask.

    A piece has the arrays `input_ids` and `labels`. The micro-batch has input_ids, labels and position_ids of
    shape (1, tokens), and the bounds of the pieces under the names of transformers' flash attention:
    cu_seq_lens_q and cu_seq_lens_k (int32, pieces + 1), max_length_q and max_length_k.
    """

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        samples = sorted(
            samples, key=lambda sample: -len(sample["input_ids"])
        )  # equal lengths together: fewer calls
        ids = np.concatenate([sample["input_ids"] for sample in samples]).astype(np.int64)
        labels = np.concatenate([sample["labels"] for sample in samples]).astype(np.int64)
        lengths = np.asarray([len(sample["input_ids"]) for sample in samples])
        ends = np.cumsum(lengths)
        begins = ends - lengths
        labels[begins] = IGNORED  # nothing precedes the first token of a piece
        positions = np.arange(len(ids)) - np.repeat(begins, lengths)
        bounds = torch.from_numpy(np.append(begins, ends[-1]).astype(np.int32))
        longest = int(lengths.max())
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
