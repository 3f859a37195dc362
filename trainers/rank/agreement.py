"""What all ranks must agree on, over a small group of their CPUs.

It is apart from the group that moves gradients: a word of a few bytes never waits for a GPU, and works where
NCCL is the only other backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainers.config.errors import ConfigError
from trainers.rank.process import rank, world_size

Word = TypeVar("Word")


class Agreement:
    """Collectives on small values; in one process they are the identity."""

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        # `background`: for the thread that ends an asynchronous save, beside the words of the main thread.
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.background: Any = dist.new_group(backend="gloo") if several else None

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self.group is None:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def gathered(self, value: Word) -> list[Word]:
        """The value of each rank, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: Word) -> Word:
        """Rank 0's value."""
        answers: list[Any] = self.gathered(value if rank() == 0 else None)
        answer: Word = answers[0]
        return answer

    def barrier(self, background: bool = False) -> None:
        group = self.background if background else self.group
        if group is not None:
            dist.barrier(group=group)


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_alike(agreement: Agreement, facts: Mapping[str, str]) -> None:
    """Compares the config, the versions and the data of all ranks.

    Raises:
        ConfigError: on every rank, where one differs from rank 0; it names the rank and both values.
    """
    everyone = agreement.gathered(dict(facts))
    lines = [
        f"rank {number} has {name} {theirs.get(name, '(none)')}, and rank 0 has {own.get(name, '(none)')}"
        for own in everyone[:1]
        for number, theirs in enumerate(everyone)
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]
    if lines:
        raise ConfigError(
            f"the ranks do not run the same thing: {'; '.join(lines)}. Start all with one config, one "
            "environment and one copy of the data."
        )
