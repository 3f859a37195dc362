"""Micro-batches: every piece once, one order per seed, and even work for the ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import build

from trainers.config.errors import ConfigError
from trainers.data.packing import whole_samples
from trainers.data.sampler import Batches, Steps, piece_costs

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)
CAPACITY = st.integers(40, 130)


def batches_of(lengths, steps, **options):
    pieces = whole_samples(lengths)
    return Batches(pieces, piece_costs(pieces.lengths, 64), steps, **options)


STEPS = st.builds(Steps, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@given(LENGTHS, STEPS, st.none() | CAPACITY, st.none() | st.integers(0, 9))
def test_the_micro_batches_of_all_ranks_have_each_piece_once(lengths, steps, capacity, seed):
    batches = batches_of(lengths, steps, capacity=capacity, seed=seed)
    found = list(batches)
    assert len(found) == len(batches) and len(found) % steps.ranks == 0, (
        "all ranks take the same number of steps"
    )
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    budget = None if capacity is None else capacity * steps.packs_per_batch
    for batch in found[: max(0, len(found) - steps.ranks * steps.accumulation)]:  # all but the last step
        assert batch, "only the last step may leave a rank without work"
        assert budget is None or sum(lengths[index] for index in batch) <= budget
        assert capacity is not None or len(batch) == steps.packs_per_batch


@given(LENGTHS, st.none() | CAPACITY, st.integers(0, 9), st.integers(1, 2))
def test_a_step_has_the_same_pieces_for_any_number_of_ranks(lengths, capacity, seed, each):
    def steps_of(ranks):
        batches = list(
            batches_of(lengths, Steps(ranks, 4 // ranks, each), capacity=capacity, seed=seed)
        )  # four micro-batches a step
        full = len(batches) // 4 * 4
        steps = [batches[begin : begin + 4] for begin in range(0, full, 4)] + [batches[full:]]
        return [sorted(index for batch in step for index in batch) for step in steps if any(step)]

    assert steps_of(1) == steps_of(2) == steps_of(4)


def test_epochs_differ_and_can_be_repeated():
    batches = batches_of([3, 9, 4, 4, 7, 2, 2, 8] * 4, Steps(2), capacity=12, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        batches.on_epoch_begin(None, SimpleNamespace(epoch=float(epoch)), None)
        orders.append(list(batches))
    assert orders[0] == orders[2] != orders[1]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 2000), min_size=64, max_size=64), st.integers(0, 9))
def test_ranks_that_wait_for_each_other_have_similar_work(lengths, seed):
    """Distributed by cost, the ranks wait no longer than with packs in their random order."""
    steps = Steps(ranks=4, accumulation=2, packs_per_batch=4)
    batches = batches_of(lengths, steps, seed=seed)
    order = np.random.default_rng((seed, 0, 1)).permutation(64)

    def waiting(found):
        costs = [batches.costs[list(batch)].sum() for batch in found]
        moments = [costs[begin : begin + 4] for begin in range(0, len(costs), 4)]
        return sum(4 * max(moment) - sum(moment) for moment in moments)

    drawn = [order[begin : begin + 4] for begin in range(0, 64, 4)]
    assert waiting(list(batches)) <= waiting(drawn) + 1e-6


def test_an_idle_rank_gets_an_empty_micro_batch():
    assert sorted(map(len, batches_of([4, 4, 4], Steps(ranks=4)))) == [0, 1, 1, 1]


def test_if_packs_are_fewer_than_ranks_their_pieces_are_distributed():
    assert sorted(map(len, batches_of([4, 4, 4, 4], Steps(ranks=4), capacity=16))) == [1, 1, 1, 1]


def test_a_pair_that_does_not_fit_in_tokens_per_batch_is_refused(tmp_path, tiny_model):
    columns = {
        "prompt_text_column": "prompt",
        "text_column": "chosen",
        "rejected_text_column": "rejected",
    }
    with pytest.raises(
        ConfigError, match=r"20 is too small for the longest sample, which has \d+ tokens \(both answers"
    ):
        build(tmp_path, tiny_model, trainer="dpo", tokens_per_batch=20, **columns)
