"""A rank without heartbeats is named, with its Python stack, and the attempt is killed."""

from __future__ import annotations

import pytest
from planted import alive

QUICK = ["--hang-timeout", "4"]


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_run_restarts(faults, backend):
    # The launcher wakes the rank so that it writes its stack. The pause keeps the run from ending meanwhile.
    run = faults.run(f"stopped-{backend}", backend, *QUICK, what="stop", rank=1, step=7, pause=0.5)
    assert "rank 1 failed first: stopped (SIGSTOP, or a debugger): no heartbeat for" in run.err
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
