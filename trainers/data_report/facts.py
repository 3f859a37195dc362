"""Facts about the samples of a part: their lengths, how full the packs are, and rows that repeat others.

Two rows are the same if the model sees the same: the token ids of all their samples. They are compared by
hashes of 64 bits, so a million rows take a few megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from typing import TYPE_CHECKING

import numpy as np

from trainers.config.schema import TrainConfig
from trainers.data.packing import Ints
from trainers.data.sampler import pack_capacity

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from trainers.data.loading import Part

BARS = 12  # a histogram has at most so many
MISMATCHED = "KL_completion_ids"  # kto's column with the completion of another row


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: how many samples have `first` to `last` tokens."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of samples in tokens."""

    shortest: int
    median: int
    most: int  # 9 of 10 samples are not longer
    nearly_all: int  # 99 of 100
    longest: int
    bars: list[Bar]


def describe_lengths(lengths: Ints) -> Lengths:
    """Return what a histogram of these lengths shows. Its bars have the same width: 1, 2 or 5 x 10^n."""
    longest, shortest = int(lengths.max()), int(lengths.min())
    width = next(
        size
        for power in count()
        for size in (10**power, 2 * 10**power, 5 * 10**power)
        if longest // size - shortest // size < BARS
    )
    start = shortest // width * width
    counts = np.bincount((lengths - start) // width)
    bars = [
        Bar(start + index * width, start + (index + 1) * width - 1, int(number))
        for index, number in enumerate(counts)
    ]
    middle, most, nearly_all = (
        int(np.quantile(lengths, share, method="inverted_cdf")) for share in (0.5, 0.9, 0.99)
    )
    return Lengths(shortest, middle, most, nearly_all, longest, bars)


@dataclass(frozen=True)
class Packing:
    """The packs of an epoch."""

    packs: int
    capacity: int  # tokens of a pack
    share: float  # of the tokens in all packs that are samples


def describe_packing(config: TrainConfig, part: Part, packs: int, lengths: Ints) -> Packing | None:
    """Return how full the packs of a part are, or None if they have no fixed size."""
    capacity = pack_capacity(config)
    if capacity is None or (part != "train" and not config.evaluates_packed):
        return None
    return Packing(packs, capacity, float(lengths.sum()) / (packs * capacity))


@dataclass(frozen=True)
class Keys:
    """What the model sees of each row, as a hash. `rows`: the numbers of the rows, from 0, in their order."""

    rows: Ints
    hashes: NDArray[np.uint64]

    @cached_property
    def first(self) -> tuple[NDArray[np.uint64], Ints]:
        """The different hashes, sorted, and where each is first."""
        values, first = np.unique(self.hashes, return_index=True)
        return values, first


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat others: row `rows[i]` is the same as row `of[i]`. Numbers count from 0."""

    rows: Ints
    of: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, limit: int) -> list[tuple[int, int]]:
        """Return the first pairs of a row and the row that it repeats."""
        return list(zip(self.rows[:limit].tolist(), self.of[:limit].tolist(), strict=True))


def row_keys(dataset: Dataset, rows: Ints) -> Keys:
    """Return the keys of the rows of a part. `rows` has the row of each sample.

    The hashes of a row's samples are added, because kto's samples are shuffled.
    """
    numbers, place = np.unique(np.asarray(rows), return_inverse=True)
    sums = np.zeros(len(numbers), dtype=np.uint64)
    np.add.at(sums, place, sample_hashes(dataset))
    return Keys(numbers, sums)


def sample_hashes(dataset: Dataset) -> NDArray[np.uint64]:
    """Return a hash of the token ids (and of kto's label) of each sample."""
    from xxhash import xxh3_64_intdigest

    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    table = dataset.data
    labels = table.column("label").to_pylist() if "label" in dataset.column_names else [False] * len(dataset)
    hashes = [int(label) for label in labels]
    for name in dataset.column_names:
        if not name.endswith("ids") or name == MISMATCHED:
            continue
        index = 0
        for chunk in table.column(name).chunks:
            ids = np.ascontiguousarray(chunk.values.to_numpy()).view(np.uint8).data
            size = chunk.values.type.bit_width // 8
            bounds = (chunk.offsets.to_numpy().astype(np.int64) * size).tolist()
            for first, last in pairwise(bounds):
                # The hash of one column is the seed of the next.
                hashes[index] = xxh3_64_intdigest(ids[first:last], seed=hashes[index])
                index += 1
    return np.asarray(hashes, dtype=np.uint64)


def duplicates(keys: Keys) -> Repeats:
    """Return the rows of a part that are the same as an earlier one."""
    values, first = keys.first
    earlier = first[np.searchsorted(values, keys.hashes)]
    again = np.flatnonzero(earlier != np.arange(len(earlier)))
    return Repeats(keys.rows[again], keys.rows[earlier[again]])


def shared(keys: Keys, other: Keys) -> Repeats:
    """Return the rows of a part that are the same as a row of another part, and the first such row."""
    values, first = other.first
    if not len(values):
        return Repeats(keys.rows[:0], keys.rows[:0])
    place = np.minimum(np.searchsorted(values, keys.hashes), len(values) - 1)
    same = np.flatnonzero(values[place] == keys.hashes)
    return Repeats(keys.rows[same], other.rows[first[place[same]]])
