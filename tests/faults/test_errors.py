"""Errors in a rank: the message names the class, each class has an exit code, and some are restarted."""

from __future__ import annotations

import json

import pytest
from planted import EVERY, alive


def checkpoints(run):
    return sorted(int(path.name.rpartition("-")[2]) for path in run.folder.glob("checkpoint-*"))


def test_an_exception_in_a_data_worker_is_a_data_error(faults):
    run = faults.run("worker", "ddp", "--dataloader-num-workers", "1", what="worker", rank=1, step=5)
    assert run.code == 7
    assert "error: rank 1 failed first (data): ValueError: Caught ValueError in DataLoader worker" in run.err
    assert "planted in a data worker" in run.err and "restart" not in run.err
    assert alive(run.folder) == []


@pytest.mark.slow
def test_running_out_of_memory_ends_the_run(faults):
    run = faults.run("memory", "ddp", what="oom", rank=1, step=5)
    assert run.code == 3
    assert "error: rank 1 failed first (out of memory): BatchTooLarge: CUDA out of memory." in run.err
    assert "restart" not in run.err


@pytest.mark.slow
def test_a_restart_fixes_a_temporary_error(faults):
    run = faults.run("passing", "ddp", what="fail", rank=1, step=7)
    assert "rank 1 failed first: RuntimeError: planted fault; restart 1 of at most 10, from" in run.err
    faults.same_end(run, "ddp")


def test_a_mistake_in_the_code_is_shown_and_not_restarted(faults):
    run = faults.run("mistake", "ddp", what="mistake", rank=1, step=7)
    assert run.code == 1
    assert "error: rank 1 failed first: TypeError: planted mistake" in run.err and "restart" not in run.err
    assert "in mistake" in run.err and "rank-1.log" in run.err  # the traceback, and the file that has it
    assert "Traceback" not in run.out and "Connection" not in run.err  # rank 0 only lost its peer
    assert "Traceback" in (run.folder / "launch" / "attempt-1" / "rank-0.log").read_text()
    assert alive(run.folder) == []


@pytest.mark.slow
def test_three_attempts_without_progress_end_the_run(faults):
    run = faults.run("stuck", "ddp", what="fail", rank=1, step=3, always=True)
    assert run.code == 1
    assert run.err.count("; restart ") == 2  # three attempts
    assert "3 attempts in a row made no progress; the run is not restarted." in run.err
    assert alive(run.folder) == []


@pytest.mark.parametrize(
    "backend", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero2"))]
)
def test_nan_stops_every_rank_at_the_same_step(faults, backend):
    run = faults.run(f"nan-{backend}", backend, what="nan", rank=1, step=EVERY)  # a step with a save
    assert run.code == 6
    assert f"(NaN): NotFinite: the loss or the gradient norm is NaN or infinite at step {EVERY}" in run.err
    assert checkpoints(run) == [] and not (run.folder / "model.safetensors").exists()
    attempt = run.folder / "launch" / "attempt-1"
    for rank in (0, 1):
        assert f"at step {EVERY}" in json.loads((attempt / f"rank-{rank}.error.json").read_text())["message"]
    written = json.loads((attempt / f"not-finite-step-{EVERY}-rank-1.json").read_text())
    assert written["batches"][0]["loss"] == "nan" and "What is" in written["batches"][0]["text"][0]


@pytest.mark.slow
def test_restart_on_nan_resumes_from_the_checkpoint_before(faults):
    run = faults.run("nan-again", "ddp", "--restart-on-nan", "true", what="nan", rank=1, step=7)
    assert "restart 1 of at most 10, from" in run.err and "checkpoint-4" in run.err
    faults.same_end(run, "ddp")


def test_ranks_that_differ_are_named(faults):
    run = faults.run("differ", "ddp", what="versions", rank=1)
    assert run.code == 2
    assert "error: the ranks do not run the same thing: rank 1 has torch 1.0.0, and rank 0 has 2." in run.err
    assert "Traceback" not in run.err


def test_a_clock_that_is_set_back_changes_nothing(faults):
    run = faults.run("clock", "ddp", "--hang-timeout", "60", what="clock", rank=1, step=3)
    faults.same_end(run, "ddp")
    assert checkpoints(run) == [8, 12] and "restart" not in run.err


def test_a_run_whose_folder_is_moved_ends_and_makes_no_other(faults):
    run = faults.start("moved", "ddp", pause=0.2)
    run.wait_for_step(EVERY + 1)
    run.folder.rename(run.folder.with_name("moved-away"))
    end = run.end()
    assert end.code == 2
    assert f"{run.folder} was moved or removed while the run wrote there" in end.err
    assert "Traceback" not in end.out + end.err
    assert not run.folder.exists()
    faults.same_end(faults.run("moved-away", "ddp", "--resume"), "ddp")
