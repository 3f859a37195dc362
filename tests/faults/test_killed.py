"""kill -9 at any moment: the run restarts, and ends with the weights of a run that was not killed."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest
from planted import LORA, alive, processes

from trainers.rank.proc_stat import read_stat

NAMED = "rank {} failed first: killed by SIGKILL"


@pytest.mark.parametrize(
    ("backend", "rank"),
    [
        ("ddp", 0),
        ("fsdp", 1),
        ("zero2", 0),
        pytest.param("ddp", 1, marks=pytest.mark.slow),
        pytest.param("fsdp", 0, marks=pytest.mark.slow),
        pytest.param("zero2", 1, marks=pytest.mark.slow),
        pytest.param("zero3", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_is_named_and_the_run_continues(faults, backend, rank):
    run = faults.run(f"killed-{backend}-{rank}", backend, what="kill", rank=rank, step=7)
    assert NAMED.format(rank) in run.err
    assert "restart 1 of at most 10, from" in run.err and "checkpoint-4" in run.err
    faults.same_end(run, backend)
    assert alive(run.folder) == []


def test_with_dropout_every_rank_restores_its_random_state(faults):
    run = faults.run("killed-lora", "ddp", *LORA, what="kill", rank=1, step=7)
    assert "restart 1 of at most 10" in run.err
    faults.same_end(run, "ddp", *LORA)


@pytest.mark.slow
def test_a_killed_rank_under_accelerate_launch(faults):
    run = faults.run("killed-cold", "ddp", "--start", "accelerate", what="kill", rank=1, step=7)
    assert NAMED.format(1) in run.err
    faults.same_end(run, "ddp")


@pytest.mark.parametrize(
    ("whom", "kept"), [pytest.param("all", False, marks=pytest.mark.slow), ("launcher", True)]
)
def test_no_rank_outlives_the_launcher_and_resume_continues(faults, whom, kept):
    running = faults.start(f"launcher-{whom}", "ddp", kept=kept, pause=0.3)
    running.wait_for_step(6)
    ranks = [running.pid(0), running.pid(1)] if whom == "all" else []
    for pid in (running.process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    running.end()
    end = time.monotonic() + 60
    while alive(running.folder):
        assert time.monotonic() < end, alive(running.folder)
        time.sleep(0.1)
    run = faults.run(running.folder.name, "ddp", "--resume")
    assert "resume: " in run.out and "checkpoint-4" in run.out
    faults.same_end(run, "ddp")


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_stopped_process_outlives_the_launcher(faults, kept):
    """SIGSTOP to all processes of a run, then kill -9 of the launcher, for which none can look."""
    flags = ("--dataloader-num-workers", "1")
    running = faults.start(f"launcher-stopped-{kept}", "ddp", *flags, kept=kept, pause=0.3)
    running.wait_for_step(6)
    pids = processes(running.folder).keys() | {read_stat(running.pid(0)).parent}
    assert len(pids) >= (5 if kept else 6)
    watched = {pid: os.pidfd_open(pid) for pid in pids}
    for pid in (running.process.pid, *pids):
        os.kill(pid, signal.SIGSTOP)
    running.process.kill()
    running.end()
    left = [pid for pid, descriptor in watched.items() if not select.select([descriptor], [], [], 60)[0]]
    try:
        assert left == [], {pid: processes(running.folder).get(pid) for pid in left}
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def test_the_spare_of_a_killed_warm_process_continues_the_run(faults):
    running = faults.start("killed-parent", "ddp", kept=False, pause=0.3)
    running.wait_for_step(6)
    os.kill(read_stat(running.pid(0)).parent, signal.SIGKILL)
    run = running.end()
    assert "the parent process of the ranks was killed by SIGKILL; restart 1 of at most 10, from" in run.err
    assert "a spare of the killed process forks the ranks; nothing is imported again" in run.out
    faults.same_end(run, "ddp")
    assert alive(run.folder) == []


def test_a_kill_during_a_save_leaves_no_checkpoint(faults):
    run = faults.run("killed-saving", "ddp", what="save", rank=0, step=8)
    assert "restart 1 of at most 10, from" in run.err and "checkpoint-4" in run.err
    faults.same_end(run, "ddp")
    assert not (run.folder / "saving").exists()


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_the_first_checkpoint_restarts_from_the_start(faults, step):
    run = faults.run(f"killed-early-{step}", "ddp", what="kill", rank=0, step=step)
    assert "restart 1 of at most 10, from the start" in run.err
    faults.same_end(run, "ddp")


@pytest.mark.slow
def test_without_restarts_the_exit_code_says_killed(faults):
    run = faults.run("killed-once", "ddp", "--max-restarts", "0", what="kill", rank=1, step=2)
    assert run.code == 4
    assert f"error: {NAMED.format(1)}" in run.err
    assert alive(run.folder) == []
