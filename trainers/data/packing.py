"""Packing: which documents share a sequence. A plan is numbers only; no token is copied for it.

    input_ids      [ a a a | b b | c c c c ]
    position_ids     0 1 2   0 1   0 1 2 3     they restart, so attention stays inside each document

    bfd      whole documents, best-fit-decreasing; a pack is as full as they fit
    wrapped  documents in their order, cut where a block is full; only the last block is shorter
    none     one document a row

Best-fit-decreasing needs no document but its length, so it is done on the histogram of lengths: many packs
that hold the same lengths are one recipe, and the time hardly grows with the number of rows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Recipe = tuple[tuple[int, int], ...]  # (length, how many documents of it in each pack), longest first


@dataclass(frozen=True)
class Pieces:
    """Parts of documents that are read whole: tokens `start` to `stop` of row `row`, one piece an index."""

    row: Ints
    start: Ints
    stop: Ints

    @property
    def lengths(self) -> Ints:
        return self.stop - self.start


def whole_rows(lengths: Any) -> Pieces:
    """Each row as one piece."""
    stop = np.asarray(lengths, dtype=np.int64)
    return Pieces(np.arange(len(stop)), np.zeros_like(stop), stop)


def wrap_rows(lengths: Any, capacity: int) -> tuple[Pieces, Ints]:
    """Rows joined in their order and cut where `capacity` tokens are full.

    Returns the pieces in that order, and offsets: block k holds the pieces offsets[k] to offsets[k + 1].
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(capacity, total, capacity))
    cuts = cuts[cuts > 0]  # rows without tokens end where they begin
    begins = np.concatenate([[0], cuts[:-1]])
    row = np.searchsorted(ends, begins, side="right")
    first = begins - (ends - lengths)[row]
    block = begins // capacity
    offsets = np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(begins))
    return Pieces(row, first, first + cuts - begins), offsets


def plan_packs(lengths: Any, capacity: int, seed: int | tuple[int, ...] | None = None) -> tuple[Ints, Ints]:
    """Best-fit-decreasing: pack k holds the rows order[offsets[k]:offsets[k + 1]], at most `capacity` tokens.

    The number of packs depends on the lengths alone; the seed says which of the rows of one length goes
    where (None: in their order).

    Raises:
        ValueError: a row is longer than `capacity`, or has no token.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return lengths, np.zeros(1, dtype=np.int64)
    if lengths.max() > capacity or lengths.min() < 1:
        raise ValueError(f"lengths must be from 1 to {capacity}, not {lengths.min()} to {lengths.max()}")
    recipes = _recipes(np.bincount(lengths), capacity)
    rows = np.arange(len(lengths))
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    by_length = rows[np.argsort(lengths[rows], kind="stable")]
    return _fill(recipes, by_length)


def _recipes(counts: Ints, capacity: int) -> list[tuple[int, Recipe]]:
    """(number of packs, what each holds), for `counts[length]` documents of each length."""
    open_packs: dict[int, list[tuple[int, Recipe]]] = defaultdict(list)  # room left -> packs that have it
    rooms = 0  # a set of the rooms that are open: bit r is set where open_packs[r] is not empty
    for length in range(len(counts) - 1, 0, -1):
        left = int(counts[length])
        while left:
            above = rooms >> length
            room = length + (above & -above).bit_length() - 1 if above else capacity
            number, recipe = open_packs[room].pop() if above else (left, ())
            if above and not open_packs[room]:
                rooms &= ~(1 << room)
            # The fullest pack stays the fullest until it is full, so best-fit goes on with it.
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
    """Puts rows into recipes. `by_length`: the rows, shortest first."""
    entries = []  # length, documents a pack, number of packs, first pack, place in the pack
    sizes, first_pack = [], 0
    for packs, recipe in recipes:
        held = 0
        for length, documents in recipe:
            entries.append((length, documents, packs, first_pack, held))
            held += documents
        sizes.append((packs, held))
        first_pack += packs
    number, size = np.asarray(sizes).T
    offsets = np.concatenate([[0], np.cumsum(np.repeat(size, number))])
    # All documents of an entry lie side by side in by_length, where entries of one length follow each other.
    table = np.asarray(entries)
    _, each, packs_of, first, place = table[np.argsort(table[:, 0], kind="stable")].T
    amount = each * packs_of
    within = np.arange(len(by_length)) - np.repeat(np.cumsum(amount) - amount, amount)
    each, first, place = (np.repeat(values, amount) for values in (each, first, place))
    slot = offsets[first + within // each] + place + within % each
    order = np.empty_like(by_length)
    order[slot] = by_length
    return order, offsets
