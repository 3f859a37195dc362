"""`phalanx cancel`: which processes and jobs end. tests/slurm uses a real SLURM."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable

import pytest
from fake_slurm import Controller
from fakes import fake_run

from launcher.cli import main

pytestmark = pytest.mark.usefixtures("no_slurm")


def test_status_and_cancel_of_a_running_run(
    held: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_run("run", step=2, max_steps=4, loss=1.25, seconds_left=3700)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  running  step 2/4  loss 1.2500  ETA 1:01:40\n"
    assert main(["cancel", "run"]) == 0
    assert capsys.readouterr().out == f"run: process {held.pid} saves and ends\n"
    assert held.wait(timeout=30) == -signal.SIGTERM


def test_all_jobs_of_a_run_are_cancelled(
    controller: Callable[..., Controller], capsys: pytest.CaptureFixture[str]
) -> None:
    stub = controller(job1="COMPLETED", job2="RUNNING", job3="PENDING")
    assert main(["cancel", "run"]) == 0
    assert stub.asked == [
        ("scontrol", "update", "JobId=2", "Requeue=0"),
        ("scancel", "--signal=TERM", "2"),
        ("scancel", "3"),
    ]
    assert capsys.readouterr().out == "run: job 2 saves and ends\nrun: job 3 was PENDING and is cancelled\n"


@pytest.mark.parametrize(("job", "asked"), [("1", []), ("3", [("scancel", "3")])])
def test_only_the_named_job_is_cancelled(
    controller: Callable[..., Controller], job: str, asked: list[tuple[str, ...]]
) -> None:
    stub = controller(job1="COMPLETED", job2="RUNNING", job3="PENDING")
    assert main(["cancel", job]) == 0
    assert stub.asked == asked


def test_a_running_job_without_a_step_is_cancelled_at_once(
    controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = controller(job2="RUNNING")
    monkeypatch.setattr("launcher.commands.cancel._has_begun", lambda job: False)
    assert main(["cancel", "run"]) == 0
    assert stub.asked == [("scancel", "2")]
