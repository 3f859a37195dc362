"""Expand SLURM's short form of node names, without a call to the controller. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def expand_nodelist(nodelist: str) -> list[str]:
    """Return the names in a list of nodes: node[08-10,12] -> node08, node09, node10, node12.

    A name may have several brackets.

    Raises:
        ValueError: the list is malformed.
    """
    found: list[str] = []
    for part in _split(nodelist):
        found += _expand(part)
    return found


def _split(nodelist: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in nodelist:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError(f"{nodelist!r} has an unbalanced bracket")
    return [part for part in parts if part]


def _expand(name: str) -> list[str]:
    head, opened, rest = name.partition("[")
    if not opened:
        return [name]
    inner, _, tail = rest.partition("]")
    return [f"{head}{number}{end}" for number in _numbers(inner) for end in _expand(tail) or [""]]


def _numbers(ranges: str) -> Sequence[str]:
    found: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"[{ranges}] is not a list of numbers")
        found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last if dash else first) + 1)]
    return found
