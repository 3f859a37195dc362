"""Which pieces a rank sees in which micro-batch: the same steps for any number of ranks, in even shares.

A step is `ranks x accumulation x packs_per_batch` packs in a seeded order, so that it holds the same
documents on one rank as on eight. Inside a step the packs are dealt so that the ranks, which wait for each
other, have micro-batches of about the same cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.data.packing import Ints, Pieces, plan_packs, whole_rows, wrap_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Steps:
    """How much a step holds."""

    ranks: int
    accumulation: int = 1
    packs_per_batch: int = 1

    @property
    def packs(self) -> int:
        return self.ranks * self.accumulation * self.packs_per_batch


def piece_costs(lengths: Ints, hidden_size: int) -> NDArray[np.float64]:
    """Work of a piece in tokens: what every token costs, and what attention adds to it.

    A layer of a decoder has about 12 h^2 weights, and each token attends to half of its document: 2 x 12 h^2
    l against 2 l^2 h floating point operations (Kaplan et al., arXiv 2001.08361, table 1).
    """
    return lengths * (1 + lengths / (12 * hidden_size))


class Batches(TrainerCallback):
    """A batch sampler: yields the micro-batches of all ranks, those of one moment side by side.

    accelerate gives every `ranks`-th of them to a rank. A micro-batch that has nothing to do (the last step
    of an epoch may have fewer pieces than there are ranks) is an empty list. As a callback it learns the
    epoch; accelerate's set_epoch does not reach a sampler after a resume.

    Args:
        pieces: what is batched.
        offsets: packs that are given, as of packing.wrap_rows; None: packs of at most `capacity` tokens are
            planned anew in each epoch.
        capacity: tokens of a pack; None: each piece is a pack.
        costs: work of each piece.
        seed: of the order; None: the order of the file (evaluation).
    """

    def __init__(
        self,
        pieces: Pieces,
        costs: NDArray[np.float64],
        steps: Steps,
        *,
        offsets: Ints | None = None,
        capacity: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.pieces, self.costs, self.steps = pieces, costs, steps
        self.offsets, self.capacity, self.seed = offsets, capacity, seed
        self.epoch = 0
        self.packs = len(self._packs()[1]) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        full, rest = divmod(self.packs, self.steps.packs)
        moment = self.steps.ranks * self.steps.packs_per_batch
        return self.steps.ranks * (full * self.steps.accumulation + -(-rest // moment))

    def __iter__(self) -> Iterator[list[int]]:
        order, offsets = self._packs()
        packs = np.split(order, offsets[1:-1])
        turns = np.arange(len(packs))
        if self.seed is not None:
            turns = np.random.default_rng((self.seed, self.epoch, 1)).permutation(turns)
        for begin in range(0, len(turns), self.steps.packs):
            yield from self._deal([packs[turn] for turn in turns[begin : begin + self.steps.packs]])

    def _packs(self) -> tuple[Ints, Ints]:
        """The packs of this epoch: the pieces in their order, and where each pack begins."""
        lengths = self.pieces.lengths
        if self.offsets is not None:
            return np.arange(len(lengths)), self.offsets
        if self.capacity is None:
            return np.arange(len(lengths)), np.arange(len(lengths) + 1)
        seed = None if self.seed is None else (self.seed, self.epoch)
        return plan_packs(lengths, self.capacity, seed)

    def _deal(self, packs: list[Ints]) -> Iterator[list[int]]:
        """The micro-batches of a step: costly packs first, each to the micro-batch with the least work."""
        ranks = self.steps.ranks
        moments = -(-len(packs) // (ranks * self.steps.packs_per_batch))
        room = self.steps.packs_per_batch
        if len(packs) < moments * ranks:  # too few for all: their documents are dealt one by one
            packs = [np.atleast_1d(piece) for pack in packs for piece in pack]
            room = -(-len(packs) // (moments * ranks))
        costs = [float(self.costs[pack].sum()) for pack in packs]
        heap = [(0.0, number) for number in range(moments * ranks)]
        batches: list[list[Ints]] = [[] for _ in heap]
        work = [0.0] * len(heap)
        for index in sorted(range(len(packs)), key=lambda i: -costs[i]):
            _, number = heapq.heappop(heap)
            batches[number].append(packs[index])
            work[number] += costs[index]
            if len(batches[number]) < room:
                heapq.heappush(heap, (work[number], number))
        # Batches of a like cost run at the same moment.
        for number in sorted(range(len(batches)), key=lambda n: -work[n]):
            yield np.concatenate(batches[number]).tolist() if batches[number] else []


def row_lengths(dataset: Dataset) -> Ints:
    """Tokens that a row asks the model to see: those of a prompt count once for each of its answers."""
    import pyarrow.compute as pc

    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    total = np.zeros(len(dataset), dtype=np.int64)
    for name in dataset.column_names:
        if name.endswith("ids"):
            times = 2 if name == "prompt_ids" else 1
            total += times * pc.list_value_length(dataset.data.column(name)).to_numpy()
    return total


def plan_batches(config: TrainConfig, hidden_size: int, ranks: int, lengths: Ints, training: bool) -> Batches:
    """The batches of a split, as the config says."""
    budget = config.token_budget
    rows = config.batch_size if training else config.per_device_eval_batch_size or config.batch_size
    pieces, offsets, capacity = whole_rows(lengths), None, _capacity(config)
    if not training and not config.evaluates_packed:
        capacity = None
    elif config.packed == "wrapped":
        rows = rows if budget is None else budget // config.sequence_length
    elif budget is not None:
        rows = 1
    if config.packed == "wrapped":  # padded too: what a block cuts is cut alike, so the loss is the same
        pieces, offsets = wrap_rows(lengths, config.sequence_length)
    return Batches(
        pieces,
        piece_costs(pieces.lengths, hidden_size),
        Steps(ranks, config.gradient_accumulation if training else 1, rows),
        offsets=offsets if capacity is not None else None,
        capacity=capacity,
        seed=config.data_seed if training else None,
    )


def count_packs(config: TrainConfig, dataset: Dataset) -> int:
    """How many packs an epoch has; where nothing is packed, the rows.

    Raises:
        ConfigError: a row does not fit in tokens_per_batch.
    """
    capacity, lengths = _capacity(config), row_lengths(dataset)
    if capacity is None or not len(lengths):
        return len(lengths)
    if config.packed == "wrapped":
        return len(wrap_rows(lengths, capacity)[1]) - 1
    if lengths.max() > capacity:
        pair = "" if config.kind.rows == "text" else " (both answers, each with its prompt)"
        raise ConfigError(
            f"tokens_per_batch: {capacity} tokens do not hold the longest row, which has "
            f"{lengths.max()}{pair}. Raise it, or lower block_size."
        )
    return len(plan_packs(lengths, capacity)[1]) - 1


def _capacity(config: TrainConfig) -> int | None:
    """Tokens of a pack; None where a row is a pack."""
    if config.packed == "wrapped":
        return config.sequence_length
    if config.kind.rows == "text" and config.packed == "bfd":
        return config.token_budget or config.sequence_length
    return config.token_budget
