"""The journal of the jobs of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.slurm.journal import jobs, note, started, starts_without_progress


def test_the_job_that_was_submitted_or_started_last_is_the_last(work: Path) -> None:
    """A job that starts comes after a job that was submitted to follow it."""
    for job, step in (("1", None), ("2", None), ("1", 0)):
        note(Path("run"), job, step)
    assert jobs(Path("run")) == ["2", "1"]
    assert started(Path("run"), "1") and not started(Path("run"), "2")
    with Path("run/launch/jobs.jsonl").open("a") as file:
        file.write('{"job": "3", "ti\n')  # two machines wrote at the same time, on a network file system
    assert jobs(Path("run")) == ["2", "1"]


@pytest.mark.parametrize(
    ("steps", "without_progress"),
    [([0], 0), ([0, 0], 1), ([0, 0, 0, 0], 3), ([0, 0, 0, 4], 0), ([0, 4, 4, 4], 2), ([4, 4, 0], 0)],
)
def test_starts_without_progress_are_counted(work: Path, steps: list[int], without_progress: int) -> None:
    """Only starts of the same job count: a user has submitted the other one."""
    for job in ("1", "2"):
        note(Path("run"), job)
        for restart, step in enumerate(steps):
            note(Path("run"), job, step, restart)
        assert starts_without_progress(Path("run"), job) == without_progress


def test_several_runs_in_one_start_of_a_job_are_not_restarts(work: Path) -> None:
    """This happens in an interactive job."""
    for _ in range(5):
        note(Path("run"), "1", 0)
    assert starts_without_progress(Path("run"), "1") == 0
