"""Resuming on another number of ranks keeps the global batch, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_checkpoint, machine

from launcher.config import Run, load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.resume_layout import with_kept_global_batch
from launcher.plan.topology import resolve_topology
from trainers.config.errors import ConfigError


@pytest.fixture
def asked(work: Path, packages: object) -> Callable[..., Run]:
    """`asked(ranks=4)` returns the run that resumes `run` with these flags, as the launcher starts it."""

    def make(ranks: int, **flags: Any) -> Run:
        given = {"trainer": "sft", "model": "model", "project_name": "run", "resume": True,
                 "num_processes": ranks, "batch_size": 2, "gradient_accumulation": 4, **flags}  # fmt: skip
        run = load_run(None, {name: str(value) for name, value in given.items()})
        topology = resolve_topology(run.launch, machine(), {})
        return with_kept_global_batch(run, topology, resolve_backend(run, topology))

    return make


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_another_number_of_ranks_keeps_the_global_batch(
    asked: Callable[..., Run], ranks: int, accumulation: int
) -> None:
    fake_checkpoint(Path("run"), 5)
    backend = "none" if ranks == 1 else "ddp"
    run = asked(ranks, distributed_backend=backend)
    assert run.train.gradient_accumulation == accumulation
    notes = [note for note in run.settings.notes if note.startswith("gradient_accumulation: ")]
    assert bool(notes) == (ranks != 2)
    if ranks != 2:
        why = "resume (checkpoint-5 was written by 2 ranks and the global batch is kept)"
        assert run.settings.sources["gradient_accumulation"] == why


def test_a_number_of_ranks_that_cannot_keep_the_global_batch_is_refused(asked: Callable[..., Run]) -> None:
    fake_checkpoint(Path("run"), 5)
    with pytest.raises(ConfigError, match=r"resume: run/checkpoint-5: its global batch is 16 \(2 ranks"):
        asked(3, distributed_backend="ddp")


def test_another_backend_is_refused(asked: Callable[..., Run]) -> None:
    fake_checkpoint(Path("run"), 5)
    with pytest.raises(ConfigError, match=r"resume: run/checkpoint-5: it was written by ddp, which fsdp"):
        asked(2, distributed_backend="fsdp")
