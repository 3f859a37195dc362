"""Signals: one rank gets it, all agree at a step boundary and save; a resume ends as an uninterrupted run."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from planted import PATIENCE, alive, processes
from terminals import Terminal

SAVED = 75


def resumed(faults, running, backend, *flags):
    """Resume a stopped run, and check that it ends with the same result."""
    stopped = running.end()
    assert stopped.code == SAVED, stopped.out + stopped.err
    assert alive(stopped.folder) == []
    step = max(int(path.name.rpartition("-")[2]) for path in stopped.folder.glob("checkpoint-*"))
    assert f"saved at step {step}" in stopped.err and step < 12
    run = faults.run(stopped.folder.name, backend, "--resume", *flags)
    assert f"resume: {stopped.folder.name}/checkpoint-{step}" in run.out
    faults.same_end(run, backend, *flags)
    return run


@pytest.mark.parametrize(
    ("backend", "number"),
    [
        ("ddp", signal.SIGTERM),
        ("fsdp", signal.SIGUSR1),
        pytest.param("ddp", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("zero2", signal.SIGUSR2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_launcher_saves_and_stops(faults, backend, number):
    running = faults.start(f"signal-{backend}-{number.name}", backend, pause=0.3)
    running.wait_for_step(5)
    running.process.send_signal(number)
    resumed(faults, running, backend)


def test_a_signal_to_one_rank_stops_all(faults):
    running = faults.start("signal-rank", "zero2", what="term", rank=1, step=6)
    resumed(faults, running, "zero2")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_a_signal_during_a_save_lets_it_end(faults, backend):
    running = faults.start(f"signal-save-{backend}", backend, what="term", rank=0, saving=4, pause=0.3)
    run = resumed(faults, running, backend)
    assert "it could not be written" not in run.out


@pytest.mark.slow
def test_a_signal_to_every_process_saves_and_stops(faults):
    """As a scheduler does: the launcher, the process that imports, the ranks, and their data workers."""
    flags = ("--dataloader-num-workers", "1")
    running = faults.start("signal-all", "ddp", *flags, kept=False, pause=0.3)
    running.wait_for_step(5)
    pids = {running.process.pid, *processes(running.folder)}
    assert len(pids) >= 6  # with the spare of the process that imports, if it is there already
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    resumed(faults, running, "ddp", *flags)


def test_a_closed_terminal_saves_and_stops(faults):
    with Terminal() as terminal:
        running = faults.start("hang-up", "ddp", terminal=terminal, pause=0.3)
        running.wait_for_step(5)
        terminal.close()
        resumed(faults, running, "ddp")


@pytest.mark.slow
def test_a_closed_terminal_saves_a_rank_that_was_started_by_hand(faults):
    """Its data worker is in the foreground of the terminal too."""
    config = faults.bench.config("hang-up-by-hand")
    config.write_text(config.read_text() + "  dataloader_num_workers: 1\n")
    environ = faults.bench.environ | faults.environ("hang-up-by-hand", pause=1)
    with Terminal() as terminal:
        argv = [sys.executable, "-m", "trainers.sft", str(config)]
        process = terminal.start(argv, cwd=faults.bench.root, env=environ)
        faults.started.append(process)
        terminal.wait_for("step 2/6", PATIENCE)
        terminal.close()
        assert process.wait(PATIENCE) == SAVED, terminal.shown.decode()
    assert list((faults.bench.root / "hang-up-by-hand").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "backend",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "fsdp", "zero2", "zero3"))],
)
@pytest.mark.parametrize(
    "what",
    ["term", pytest.param("kill", marks=pytest.mark.slow), pytest.param("stop", marks=pytest.mark.slow)],
)
def test_a_fault_during_an_evaluation(faults, backend, what):
    """The evaluation is interrupted, and repeated on resume, or by a restart."""
    flags = ("--eval-strategy", "steps", "--eval-steps", "4", "--per-device-eval-batch-size", "1")
    rank, name = int(backend != "one"), f"{what}-evaluation-{backend}"
    fault = {"what": what, "rank": rank, "evaluation": 8}
    if what == "term":
        run = resumed(faults, faults.start(name, backend, *flags, **fault), backend, *flags)
    else:
        quick = ("--hang-timeout", "4") if what == "stop" else ()
        # The launcher wakes a stopped rank. The pause keeps the run from ending meanwhile.
        run = faults.run(name, backend, *flags, *quick, pause=0.5, **fault)
        cause = {"kill": "killed by SIGKILL", "stop": "stopped (SIGSTOP"}[what]
        assert f"rank {rank} failed first: {cause}" in run.err and "restart 1" in run.err, run.out + run.err
        faults.same_end(run, backend, *flags)
    uninterrupted = faults.uninterrupted(backend, *flags)
    scores = [(e["step"], e["eval_loss"]) for e in run.metrics if "eval_loss" in e]
    assert scores == [(e["step"], e["eval_loss"]) for e in uninterrupted.metrics if "eval_loss" in e]
    assert [step for step, _ in scores] == [4, 8, 12]


def test_a_signal_before_the_first_step_saves_nothing(faults):
    running = faults.start("signal-early", "ddp", pause=0.3)
    running.wait_for(lambda: (running.attempt / "rank-1.pid").exists())
    running.process.send_signal(signal.SIGTERM)
    stopped = running.end()
    assert stopped.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: nothing was saved" in stopped.err
    assert alive(stopped.folder) == [] and not list(stopped.folder.glob("checkpoint-*"))


def test_a_signal_during_the_imports_ends_the_run(faults):
    running = faults.start("signal-import", "ddp")
    running.wait_for(lambda: (running.attempt / "command.txt").exists())
    running.process.send_signal(signal.SIGTERM)
    assert running.end().code == 128 + signal.SIGTERM
    assert alive(running.folder) == []


@pytest.mark.slow
def test_a_second_interrupt_kills_at_once(faults):
    running = faults.start("signal-twice", "ddp", pause=30)
    running.wait_for(lambda: (running.attempt / "rank-1.pid").exists())
    running.wait_for(lambda: "example" in (running.attempt / "rank-0.log").read_text())
    running.process.send_signal(signal.SIGINT)
    running.wait_for(lambda: True)
    running.process.send_signal(signal.SIGINT)
    stopped = running.end()
    assert stopped.code == 128 + signal.SIGINT
    assert alive(stopped.folder) == []
