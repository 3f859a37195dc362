"""Resuming on another number of ranks keeps the global batch, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_checkpoint

from launcher.config import Run
from launcher.plan.resume_layout import with_kept_global_batch
from trainers.config.errors import ConfigError


@pytest.fixture
def resumed(resolve: Callable[..., Any]) -> Callable[..., Run]:
    """`resumed(ranks=4)` returns the run that resumes `run` with these flags, as the launcher starts it."""

    def make(ranks: int, **flags: Any) -> Run:
        batch = {"batch_size": 2, "gradient_accumulation": 4}
        return with_kept_global_batch(*resolve(resume=True, num_processes=ranks, **batch, **flags))

    return make


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_another_number_of_ranks_keeps_the_global_batch(
    resumed: Callable[..., Run], ranks: int, accumulation: int
) -> None:
    fake_checkpoint(Path("run"), 5)
    backend = "none" if ranks == 1 else "ddp"
    run = resumed(ranks, distributed_backend=backend)
    assert run.train.gradient_accumulation == accumulation
    notes = [note for note in run.settings.notes if note.startswith("gradient_accumulation: ")]
    assert bool(notes) == (ranks != 2)
    if ranks != 2:
        why = "resume (checkpoint-5 was written by 2 ranks and the global batch is kept)"
        assert run.settings.sources["gradient_accumulation"] == why


def test_a_number_of_ranks_that_cannot_keep_the_global_batch_is_refused(resumed: Callable[..., Run]) -> None:
    fake_checkpoint(Path("run"), 5)
    with pytest.raises(ConfigError, match=r"resume: run/checkpoint-5: its global batch is 16 \(2 ranks"):
        resumed(3, distributed_backend="ddp")


def test_another_backend_is_refused(resumed: Callable[..., Run]) -> None:
    fake_checkpoint(Path("run"), 5)
    with pytest.raises(ConfigError, match=r"resume: run/checkpoint-5: it was written by ddp, which fsdp"):
        resumed(2, distributed_backend="fsdp")
