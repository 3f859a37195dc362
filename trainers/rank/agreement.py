"""Values that all ranks must agree on, exchanged in a process group of their CPUs (gloo).

The group is separate from the one that moves gradients. So a message of a few bytes never waits for a GPU,
and it also works if NCCL is the only other backend.
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

Value = TypeVar("Value")


class Agreement:
    """Collectives for small values. In a run of one process they do not communicate."""

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        # `background`: for the thread that finishes an asynchronous save, while the main thread uses `group`.
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.background: Any = dist.new_group(backend="gloo") if several else None

    def maximum(self, *values: int) -> list[int]:
        """Return the maximum of each value over all ranks."""
        if self.group is None:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_rank_0(self, value: Value) -> Value:
        """Return the value of rank 0."""
        answers: list[Any] = self.gather(value if rank() == 0 else None)
        answer: Value = answers[0]
        return answer

    def barrier(self, background: bool = False) -> None:
        """Wait for all ranks."""
        group = self.background if background else self.group
        if group is not None:
            dist.barrier(group=group)


def digest(value: Any) -> str:
    """Return a short hash of a JSON value (16 hex digits)."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_alike(agreement: Agreement, facts: Mapping[str, str]) -> None:
    """Compare facts (the config, the versions, the data) of all ranks.

    Raises:
        ConfigError: a rank differs from rank 0; raised on every rank, with the rank and both values.
    """
    everyone = agreement.gather(dict(facts))
    lines = [
        f"rank {number} has {name} {theirs.get(name, '(none)')}, and rank 0 has {own.get(name, '(none)')}"
        for own in everyone[:1]
        for number, theirs in enumerate(everyone)
        for name in sorted(own.keys() | theirs.keys())
        if own.get(name) != theirs.get(name)
    ]
    if lines:
        raise ConfigError(
            f"the ranks do not run the same thing: {'; '.join(lines)}. Start all ranks with the same "
            "config, environment and data."
        )
