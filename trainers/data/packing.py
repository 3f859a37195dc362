"""Packing: plan which pieces share a sequence. A plan consists of numbers; no token is copied for it.

    input_ids      [ a a a | b b | c c c c ]
    position_ids     0 1 2   0 1   0 1 2 3     positions restart, so attention stays inside each piece

    bfd      complete samples, planned by best-fit-decreasing; a pack is as full as the lengths allow
    wrapped  samples in their order, cut where a pack is full; only the last pack is shorter
    none     one sample per sequence

Best-fit-decreasing needs only the lengths, so it runs on the histogram of lengths. Many packs with the same
lengths are one recipe, so the time hardly grows with the number of samples.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Recipe = tuple[tuple[int, int], ...]  # (length, pieces of this length in each pack), longest first


@dataclass(frozen=True)
class Pieces:
    """The pieces of a split: piece i is the tokens start[i] to stop[i] of the sample number sample[i]."""

    sample: Ints
    start: Ints
    stop: Ints

    @property
    def lengths(self) -> Ints:
        return self.stop - self.start


def whole_samples(lengths: Any) -> Pieces:
    """Return each sample as one piece."""
    stop = np.asarray(lengths, dtype=np.int64)
    return Pieces(np.arange(len(stop)), np.zeros_like(stop), stop)


def wrap_samples(lengths: Any, capacity: int) -> tuple[Pieces, Ints]:
    """Join samples in their order, and cut them where a pack has `capacity` tokens.

    Returns the pieces in that order, and offsets: pack k has the pieces offsets[k]:offsets[k + 1].
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(capacity, total, capacity))
    cuts = cuts[cuts > 0]  # a sample without tokens ends where it begins
    begins = np.concatenate([[0], cuts[:-1]])
    sample = np.searchsorted(ends, begins, side="right")
    first = begins - (ends - lengths)[sample]
    pack = begins // capacity
    offsets = np.append(np.flatnonzero(np.diff(pack, prepend=-1)), len(begins))
    return Pieces(sample, first, first + cuts - begins), offsets


def plan_packs(lengths: Any, capacity: int, seed: int | tuple[int, ...] | None = None) -> tuple[Ints, Ints]:
    """Plan packs of at most `capacity` tokens by best-fit-decreasing.

    Returns order and offsets: pack k has the pieces order[offsets[k]:offsets[k + 1]]. The number of packs
    depends only on the lengths. The seed decides which pieces of equal length go to which pack (None: in
    their order).

    Raises:
        ValueError: a piece is longer than `capacity`, or has no token.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return lengths, np.zeros(1, dtype=np.int64)
    if lengths.max() > capacity or lengths.min() < 1:
        raise ValueError(f"lengths must be from 1 to {capacity}, not {lengths.min()} to {lengths.max()}")
    recipes = _recipes(np.bincount(lengths), capacity)
    pieces = np.arange(len(lengths))
    if seed is not None:
        pieces = np.random.default_rng(seed).permutation(pieces)
    by_length = pieces[np.argsort(lengths[pieces], kind="stable")]
    return _fill(recipes, by_length)


def _recipes(counts: Ints, capacity: int) -> list[tuple[int, Recipe]]:
    """Return (number of packs, recipe of each), for `counts[length]` pieces of each length."""
    open_packs: dict[int, list[tuple[int, Recipe]]] = defaultdict(list)  # free tokens -> packs that have them
    rooms = 0  # a set of bits: bit r is set if open_packs[r] is not empty
    for length in range(len(counts) - 1, 0, -1):
        left = int(counts[length])
        while left:
            above = rooms >> length
            room = length + (above & -above).bit_length() - 1 if above else capacity
            number, recipe = open_packs[room].pop() if above else (left, ())
            if above and not open_packs[room]:
                rooms &= ~(1 << room)
            # The pack that fits best remains the best until it is full, so it is filled at once.
            each = min(room // length, left)
            filled = min(number, left // each)
            if above and filled < number:
                open_packs[room].append((number - filled, recipe))
                rooms |= 1 << room
            rest = room - each * length
            open_packs[rest].append((filled, (*recipe, (length, each))))
            rooms |= 1 << rest
            left -= filled * each
    return [pack for packs in open_packs.values() for pack in packs]


def _fill(recipes: list[tuple[int, Recipe]], by_length: Ints) -> tuple[Ints, Ints]:
    """Put pieces into recipes. `by_length`: the pieces, shortest first."""
    entries = []  # length, pieces per pack, number of packs, first pack, position in the pack
    sizes, first_pack = [], 0
    for packs, recipe in recipes:
        held = 0
        for length, pieces in recipe:
            entries.append((length, pieces, packs, first_pack, held))
            held += pieces
        sizes.append((packs, held))
        first_pack += packs
    number, size = np.asarray(sizes).T
    offsets = np.concatenate([[0], np.cumsum(np.repeat(size, number))])
    # by_length has all pieces of an entry together, and entries of equal length one after the other.
    table = np.asarray(entries)
    _, each, packs_of, first, place = table[np.argsort(table[:, 0], kind="stable")].T
    amount = each * packs_of
    within = np.arange(len(by_length)) - np.repeat(np.cumsum(amount) - amount, amount)
    each, first, place = (np.repeat(values, amount) for values in (each, first, place))
    slot = offsets[first + within // each] + place + within % each
    order = np.empty_like(by_length)
    order[slot] = by_length
    return order, offsets
