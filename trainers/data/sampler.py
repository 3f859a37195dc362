"""Plan which pieces are in which step and in which micro-batch of a rank, with even work for all ranks.

A step is `ranks x accumulation x packs_per_batch` packs in a seeded order. So it has the same pieces on one
rank as on eight, if this product is the same. The ranks wait for each other, so the packs of a step are
distributed such that micro-batches that run at the same time have about the same cost.
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
from trainers.data.packing import Ints, Pieces, plan_packs, whole_samples, wrap_samples

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Steps:
    """The size of a step."""

    ranks: int
    accumulation: int = 1
    packs_per_batch: int = 1

    @property
    def packs(self) -> int:
        return self.ranks * self.accumulation * self.packs_per_batch


def piece_costs(lengths: Ints, hidden_size: int) -> NDArray[np.float64]:
    """Return the work of each piece in tokens: its length, plus what attention adds.

    A decoder layer has about 12 h^2 weights, and a token attends to half of its piece on average. So it
    computes 2 x 12 h^2 l floating point operations, and 2 l^2 h for attention (Kaplan et al., arXiv
    2001.08361, table 1).
    """
    return lengths * (1 + lengths / (12 * hidden_size))


class Batches(TrainerCallback):
    """A batch sampler, which yields the micro-batches of all ranks; those that run together are neighbours.

    accelerate gives every `ranks`-th of them to a rank. The last step of an epoch may have fewer pieces than
    there are ranks: a micro-batch without work is an empty list. The sampler is also a callback, which tells
    it the epoch, because accelerate's set_epoch does not reach a sampler after a resume.

    Args:
        pieces: the pieces of the split.
        costs: the work of each piece.
        steps: the size of a step.
        offsets: the packs, as packing.wrap_samples returns them. None: packs of at most `capacity` tokens are
            planned again in each epoch.
        capacity: the tokens of a pack. None: each piece is a pack.
        seed: the seed of the order. None: the order of the file (evaluation).
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
        """Return the packs of this epoch: the pieces in their order, and where each pack begins."""
        lengths = self.pieces.lengths
        if self.offsets is not None:
            return np.arange(len(lengths)), self.offsets
        if self.capacity is None:
            return np.arange(len(lengths)), np.arange(len(lengths) + 1)
        seed = None if self.seed is None else (self.seed, self.epoch)
        return plan_packs(lengths, self.capacity, seed)

    def _deal(self, packs: list[Ints]) -> Iterator[list[int]]:
        """Yield the micro-batches of a step.

        The costliest packs are distributed first, each to the micro-batch with the least work.
        """
        ranks = self.steps.ranks
        moments = -(-len(packs) // (ranks * self.steps.packs_per_batch))
        room = self.steps.packs_per_batch
        if len(packs) < moments * ranks:  # too few: distribute their pieces one by one
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
        # Micro-batches of similar cost run at the same time.
        for number in sorted(range(len(batches)), key=lambda n: -work[n]):
            yield np.concatenate(batches[number]).tolist() if batches[number] else []


def sample_lengths(dataset: Dataset, prompts: int = 2) -> Ints:
    """Return the tokens that the model sees of each sample. A prompt counts once for each of its answers.

    `prompts`: how often it counts. The samples may be a selection of those in the files; none is copied.
    """
    import pyarrow.compute as pc

    total: Ints | int = 0
    for name in dataset.column_names:
        if name.endswith("ids"):
            times = prompts if name == "prompt_ids" else 1
            total = total + times * pc.list_value_length(dataset.data.column(name)).to_numpy()
    lengths = np.asarray(total, dtype=np.int64)
    if dataset._indices is not None:
        lengths = lengths[dataset._indices.column(0).to_numpy()]
    return lengths


def plan_batches(config: TrainConfig, hidden_size: int, ranks: int, lengths: Ints, training: bool) -> Batches:
    """Return the micro-batches of a split, as the config asks for them."""
    budget = config.token_budget
    packs = config.batch_size if training else config.per_device_eval_batch_size or config.batch_size
    pieces, offsets, capacity = whole_samples(lengths), None, pack_capacity(config)
    if not training and not config.evaluates_packed:
        capacity = None
    elif config.packed == "wrapped":
        packs = packs if budget is None else budget // config.sequence_length
    elif budget is not None:
        packs = 1
    if config.packed == "wrapped":  # a padded evaluation has the same pieces, so its loss is the same
        pieces, offsets = wrap_samples(lengths, config.sequence_length)
    return Batches(
        pieces,
        piece_costs(pieces.lengths, hidden_size),
        Steps(ranks, config.gradient_accumulation if training else 1, packs),
        offsets=offsets if capacity is not None else None,
        capacity=capacity,
        seed=config.data_seed if training else None,
    )


def count_packs(config: TrainConfig, dataset: Dataset) -> int:
    """Return how many packs an epoch has, or how many samples if nothing is packed.

    Raises:
        ConfigError: a sample does not fit in tokens_per_batch.
    """
    capacity, lengths = pack_capacity(config), sample_lengths(dataset)
    if capacity is None or not len(lengths):
        return len(lengths)
    if config.packed == "wrapped":
        return len(wrap_samples(lengths, capacity)[1]) - 1
    if lengths.max() > capacity:
        pair = "" if config.kind.rows == "text" else " (both answers, each with its prompt)"
        raise ConfigError(
            f"tokens_per_batch: {capacity} is too small for the longest sample, which has {lengths.max()} "
            f"tokens{pair}. Raise tokens_per_batch, or lower block_size."
        )
    return len(plan_packs(lengths, capacity)[1]) - 1


def pack_capacity(config: TrainConfig) -> int | None:
    """Return the tokens of a pack, or None if each sample is a pack."""
    if config.packed == "wrapped":
        return config.sequence_length
    if config.kind.rows == "text" and config.packed == "bfd":
        return config.token_budget or config.sequence_length
    return config.token_budget
