"""A run that resumes keeps the global batch of its checkpoint, or says what changes in its place."""

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
def resumed(work: Path, packages: object) -> Callable[..., Run]:
    """`resumed(ranks, **flags)` resumes checkpoint-5 of two ranks, batch_size 2, gradient_accumulation 4."""

    def make(ranks: int, **flags: Any) -> Run:
        given = {"trainer": "sft", "model": "model", "project_name": "run", "resume": True, "batch_size": 2,
                 "num_processes": ranks, "distributed_backend": "ddp", **flags}  # fmt: skip
        run = load_run(None, {name: str(value) for name, value in given.items()})
        topology = resolve_topology(run.launch, machine(), {})
        return with_kept_global_batch(run, topology, resolve_backend(run, topology))

    fake_checkpoint(Path("run"), 5)
    return make


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_another_number_of_ranks_keeps_the_global_batch(
    resumed: Callable[..., Run], ranks: int, accumulation: int
) -> None:
    backend = "none" if ranks == 1 else "ddp"
    run = resumed(ranks, gradient_accumulation=4, distributed_backend=backend)
    assert run.train.gradient_accumulation == accumulation
    notes = [note for note in run.settings.notes if note.startswith("gradient_accumulation: ")]
    assert bool(notes) == (ranks != 2)
    if ranks != 2:
        why = "resume (checkpoint-5 was written by 2 ranks and the global batch is kept)"
        assert run.settings.sources["gradient_accumulation"] == why


def test_a_number_of_ranks_that_cannot_keep_the_global_batch_is_refused(resumed: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"resume: run/checkpoint-5: its global batch is 16 \(2 ranks"):
        resumed(3, gradient_accumulation=4, distributed_backend="ddp")


def test_another_backend_is_refused(resumed: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"resume: run/checkpoint-5: it was written by ddp, which fsdp"):
        resumed(2, gradient_accumulation=4, distributed_backend="fsdp")


def test_on_as_many_ranks_the_users_gradient_accumulation_stays(resumed: Callable[..., Run]) -> None:
    run = resumed(2, gradient_accumulation=2)
    assert run.train.gradient_accumulation == 2
    assert run.settings.sources["gradient_accumulation"] == "flag --gradient-accumulation"


def test_a_refusal_has_the_users_gradient_accumulation(resumed: Callable[..., Run]) -> None:
    """Not the one that was tried in its place: 16 is not a multiple of 3 ranks x batch_size 2."""
    with pytest.raises(ConfigError, match=r"this run is 24 \(3 ranks x batch_size 2 x gradient_accumul.* 4"):
        resumed(3, gradient_accumulation=4)


SKIPPED = (
    "a step of run/checkpoint-5 had 16 (2 ranks x batch_size 2 x gradient_accumulation 4), and a step of "
    "this run has 8 (2 ranks x batch_size 2 x gradient_accumulation 2): the data continues by steps, so some "
    "rows are skipped or repeated."
)


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ({"gradient_accumulation": 2}, [SKIPPED]),
        ({"gradient_accumulation": 4}, []),
        ({"gradient_accumulation": 4, "tokens_per_batch": 4096}, []),
        # Steps that tokens_per_batch fills have no fixed number of samples.
        ({"gradient_accumulation": 2, "tokens_per_batch": 4096}, []),
    ],
    ids=str,
)
def test_steps_of_another_size_have_a_note_that_rows_are_skipped_or_repeated(
    resumed: Callable[..., Run], flags: dict[str, int], notes: list[str]
) -> None:
    assert [note for note in resumed(2, **flags).settings.notes if "a step of" in note] == notes
