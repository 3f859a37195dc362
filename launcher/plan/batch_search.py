"""auto_find_batch_size: the batch size of the next attempt after memory ran out.

Pure: starts nothing. Each line below is one attempt. All attempts have the same global batch:

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
    """Return the next smaller batch_size and its gradient_accumulation, or None if there is none.

    Only a divisor keeps the global batch exactly the same: 8 -> 4, 6 -> 3, 9 -> 3, 7 -> 1.
    """
    size = train.batch_size
    for smaller in range(size // 2, smallest_batch(train) - 1, -1):
        if size % smaller == 0:
            return smaller, train.gradient_accumulation * (size // smaller)
    return None


def with_smaller_batch(run: Run) -> Run | None:
    """Return the run of the next attempt, or None if there is no smaller batch_size."""
    smaller = next_smaller(run.train)
    if smaller is None:
        return None
    why = f"auto_find_batch_size ({run.train.batch_size} ran out of memory)"
    return run.changed(why, batch_size=smaller[0], gradient_accumulation=smaller[1])


def announce(old: Run, new: Run, rank: int, checkpoint: Path | None) -> str:
    """Return one line: what ran out of memory, what is tried next, and from which checkpoint."""
    size, accumulation = new.train.batch_size, new.train.gradient_accumulation
    return (
        f"rank {rank} ran out of memory with batch_size {old.train.batch_size}: trying batch_size {size} and "
        f"gradient_accumulation {accumulation} (the same global batch), from {checkpoint or 'the start'}"
    )
