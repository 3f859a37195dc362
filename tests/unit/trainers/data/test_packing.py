"""Packs: every token once, no pack over its capacity, and one plan for each seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.packing import plan_packs, wrap_samples

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)
CAPACITY = st.integers(40, 130)


def packs_of(order, offsets):
    return np.split(order, offsets[1:-1])


@given(LENGTHS, CAPACITY, st.none() | st.integers(0, 99))
def test_each_piece_is_in_one_pack_and_no_pack_is_over_its_capacity(lengths, capacity, seed):
    lengths = np.asarray(lengths)
    order, offsets = plan_packs(lengths, capacity, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert offsets[0] == 0 and offsets[-1] == len(lengths)
    for pack in packs_of(order, offsets):
        assert 0 < lengths[pack].sum() <= capacity


@given(LENGTHS, CAPACITY)
def test_a_plan_is_as_good_as_best_fit_decreasing_piece_by_piece(lengths, capacity):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    assert len(plan_packs(lengths, capacity)[1]) - 1 == len(rooms)


@given(LENGTHS, CAPACITY, st.integers(0, 99))
def test_a_seed_gives_one_plan_and_all_seeds_the_same_number_of_packs(lengths, capacity, seed):
    one, again = (plan_packs(lengths, capacity, seed) for _ in range(2))
    assert np.array_equal(one[0], again[0]) and np.array_equal(one[1], again[1])
    assert len(plan_packs(lengths, capacity, seed + 1)[1]) == len(one[1])


@pytest.mark.parametrize("lengths", [[5, 41], [0, 3]])
def test_pieces_that_cannot_be_packed_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be from 1 to 40"):
        plan_packs(lengths, 40)


def test_without_pieces_there_are_no_packs():
    order, offsets = plan_packs([], 8)
    assert not len(order) and offsets.tolist() == [0]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), st.integers(1, 50))
def test_wrapped_packs_have_the_tokens_in_their_order_and_are_full(lengths, capacity):
    pieces, offsets = wrap_samples(lengths, capacity)
    tokens = [(sample, place) for sample, length in enumerate(lengths) for place in range(length)]
    found = [
        (sample, place)
        for sample, start, stop in zip(pieces.sample, pieces.start, pieces.stop, strict=True)
        for place in range(start, stop)
    ]
    assert found == tokens
    sizes = [pieces.lengths[begin:end].sum() for begin, end in pairwise(offsets)]
    full, rest = divmod(len(tokens), capacity)
    assert sizes == [capacity] * full + [rest] * bool(rest)
    assert offsets[-1] == len(pieces.sample)
