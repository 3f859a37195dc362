"""auto_find_batch_size: what the next attempt takes after memory ran out.

Pure: starts nothing. Each line is one attempt, and all have one global batch:

    batch_size 8   gradient_accumulation  1
    batch_size 4   gradient_accumulation  2
    batch_size 2   gradient_accumulation  4
    batch_size 1   gradient_accumulation  8
"""

from __future__ import annotations

from pathlib import Path

from launcher.config import Run
from trainers.config.consistency import smallest_batch
from trainers.config.schema import TrainConfig


def next_smaller(train: TrainConfig) -> tuple[int, int] | None:
    """The next smaller batch_size and its gradient_accumulation; None where there is none.

    Only a divisor keeps the global batch to the row: 8 -> 4, 6 -> 3, 9 -> 3, 7 -> 1.
    """
    size = train.batch_size
    for smaller in range(size // 2, smallest_batch(train) - 1, -1):
        if size % smaller == 0:
            return smaller, train.gradient_accumulation * (size // smaller)
    return None


def with_smaller_batch(run: Run) -> Run | None:
    """The run of the next attempt; None where there is no smaller batch_size."""
    smaller = next_smaller(run.train)
    if smaller is None:
        return None
    why = f"auto_find_batch_size ({run.train.batch_size} ran out of memory)"
    return run.changed(why, batch_size=smaller[0], gradient_accumulation=smaller[1])


def announce(old: Run, new: Run, rank: int, checkpoint: Path | None) -> str:
    """One line: what ran out, what is tried next, and from where."""
    size, accumulation = new.train.batch_size, new.train.gradient_accumulation
    return (
        f"rank {rank} ran out of memory with batch_size {old.train.batch_size}: trying batch_size {size} and "
        f"gradient_accumulation {accumulation} (the same global batch), from {checkpoint or 'the start'}"
    )


# fmt: on
