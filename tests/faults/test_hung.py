"""A rank without heartbeats is named, with its Python stack, and the attempt is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest
from planted import alive

from trainers.rank.proc_stat import read_stat

QUICK = ["--hang-timeout", "4"]


@pytest.mark.parametrize(
    ("backend", "rank"),
    [
        ("ddp", 1),
        pytest.param("one", 0, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
        pytest.param("zero2", 0, marks=pytest.mark.slow),
        pytest.param("zero3", 1, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_rank_is_named_and_the_run_restarts(faults, backend, rank):
    # The launcher wakes the rank so that it writes its stack. The pause keeps the run from ending meanwhile.
    run = faults.run(f"stopped-{backend}", backend, *QUICK, what="stop", rank=rank, step=7, pause=0.5)
    assert f"rank {rank} failed first: stopped (SIGSTOP, or a debugger): no heartbeat for" in run.err
    assert "restart 1 of at most 10, from" in run.err
    faults.same_end(run, backend)
    assert alive(run.folder) == []


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_blocks_the_interpreter_is_named(faults, rank):
    run = faults.run(f"held-{rank}", "ddp", *QUICK, "--max-restarts", "0", what="hold", rank=rank, step=7)
    assert run.code == 9
    assert f"error: rank {rank} failed first: hung: no heartbeat for" in run.err
    assert "in phase 'step' after step 6" in run.err
    assert "in hold_the_interpreter" in run.err  # the stack, though the rank cannot run Python
    assert alive(run.folder) == []


@pytest.mark.slow
def test_a_rank_that_waits_in_a_save_is_named_and_the_run_restarts(faults):
    """Its thread still sends heartbeats."""
    run = faults.run("save-waits", "ddp", *QUICK, what="save-waits", rank=0, step=8)
    assert "rank 0 failed first: hung: no progress for" in run.err
    assert "in phase 'save' after step 8" in run.err
    assert "in wait_for_a_server" in (run.folder / "launch" / "attempt-1" / "rank-0.stack").read_text()
    faults.same_end(run, "ddp")
    assert alive(run.folder) == []


@pytest.mark.slow
def test_a_rank_that_waits_before_the_first_step_is_named_and_the_run_restarts(faults):
    run = faults.run("start-waits", "ddp", *QUICK, what="wait", rank=1, step=1)
    assert "rank 1 failed first: hung: no progress for" in run.err
    assert "in phase 'start' after step 0" in run.err and "restart 1" in run.err
    faults.same_end(run, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "launcher and ranks"])
def test_a_stopped_launcher_blames_no_rank_when_it_continues(faults, whom):
    """A suspended job, for longer than a rank may hang."""
    running = faults.start(f"asleep-{len(whom)}", "ddp", *QUICK, pause=0.3)
    running.wait_for_step(5)
    pids = [running.process.pid] + ([running.pid(0), running.pid(1)] if "ranks" in whom else [])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)  # the fault
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    run = running.end()
    assert "failed first" not in run.err and "restart" not in run.err
    faults.same_end(run, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_a_stopped_process_that_forks_the_ranks_is_continued(faults, kept):
    """It reports the ends of the ranks."""
    running = faults.start(f"parent-asleep-{kept}", "ddp", kept=kept, pause=0.3)
    running.wait_for_step(5)
    parent = read_stat(running.pid(0)).parent
    os.kill(parent, signal.SIGSTOP)
    run = running.end()
    assert f"warning: process {parent}, which forks the ranks, was stopped; it is continued" in run.err
    faults.same_end(run, "ddp")
