"""SLURM as a job sees it: its id, its end, and whether it is requeued."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fakes import fake_run

from launcher.config import load_run
from launcher.slurm import job as slurm
from launcher.slurm.journal import note

pytestmark = pytest.mark.usefixtures("no_slurm")


def test_the_job_of_a_task() -> None:
    assert slurm.this_job({"SLURM_JOB_ID": "7"}) is None, "the batch script, or a shell of salloc"
    assert slurm.this_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == "7"
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.this_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", **array}) == "5_2"


def test_the_end_of_the_job_is_read_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert slurm.end_time({}) is None
    assert slurm.end_time({**task, "SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    asked: list[tuple[str, ...]] = []
    for answer, end in (("2026-01-02T03:04:05", (2026, 1, 2, 3, 4, 5)), ("N/A", None), ("", None)):
        monkeypatch.setattr(slurm, "ask", lambda *argv, answer=answer: asked.append(argv) or answer)
        found = slurm.end_time(task)
        assert (found and time.localtime(found)[:6]) == end
    assert asked[0] == ("squeue", "-h", "-j", "7", "-o", "%e")


@pytest.mark.parametrize(
    ("known", "requeued"),
    [
        ("JobState=RUNNING Requeue=1 BatchFlag=1", True),
        ("JobState=RUNNING Requeue=1 BatchFlag=2", True),
        ("JobState=RUNNING Requeue=0 BatchFlag=1", False),
        ("JobState=RUNNING Requeue=1 BatchFlag=0", False),
        ("JobState=CANCELLED Requeue=1 BatchFlag=1", False),
    ],
)
def test_which_jobs_are_requeued(monkeypatch: pytest.MonkeyPatch, known: str, requeued: bool) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "ask", lambda *argv: asked.append(argv) or known)
    assert slurm.requeue("7") is requeued
    assert (("scontrol", "requeue", "7") in asked) is requeued


def test_a_job_with_a_preempt_time_is_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    for when, preempted in (("None", False), ("2026-01-02T03:04:05", True)):
        monkeypatch.setattr(slurm, "ask", lambda *_, when=when: f"JobId=7 PreemptTime={when} Requeue=1")
        assert slurm.preempted("7") is preempted


def test_the_id_of_a_start_has_the_restart_count() -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert slurm.this_start({}) is None
    assert slurm.this_start(task) == "7.0.0"
    assert slurm.this_start({**task, "SLURM_RESTART_COUNT": "2"}) == "7.0.2"


def test_a_requeued_job_resumes_only_its_own_run() -> None:
    """Until the job has started in the folder, the run there is another one, which may be overwritten."""
    Path("c.yaml").write_text("task: llm-sft\nbase_model: m\nproject_name: run\ndata: {path: data}\n")
    fake_run("run")
    run = load_run(Path("c.yaml"), {"overwrite": "true"})
    environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}
    assert slurm.resumed_by_slurm(run, environ) is run
    note(Path("run"), "7")
    assert slurm.resumed_by_slurm(run, environ) is run
    note(Path("run"), "7", 0)
    train = slurm.resumed_by_slurm(run, environ).train
    assert (train.resume, train.overwrite) == (True, False)
    assert slurm.resumed_by_slurm(run, {"SLURM_RESTART_COUNT": "1"}) is run, "a variable that a user exported"
