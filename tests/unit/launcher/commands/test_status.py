"""`phalanx status` on the folders of runs. tests/slurm uses a real SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import fake_run

from launcher.cli import main
from launcher.slurm import job as slurm
from launcher.slurm.journal import note

pytestmark = pytest.mark.usefixtures("no_slurm")


def test_status_of_a_stopped_run(capsys: pytest.CaptureFixture[str]) -> None:
    fake_run("run", step=2, max_steps=4, loss=1.25, tokens_per_second=812.4, seconds_left=3700)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  stopped  step 2/4  loss 1.2500  812 tokens/s\n"


def test_status_lists_all_runs_below_the_working_folder(capsys: pytest.CaptureFixture[str]) -> None:
    fake_run("runs/a")
    fake_run("b")
    note(Path("waiting"), "12")
    Path("none/launch").mkdir(parents=True)
    assert main(["status", "--json"]) == 0
    found = {one["run"]: (one["state"], one["job"]) for one in json.loads(capsys.readouterr().out)}
    assert found == {"b": ("stopped", None), "runs/a": ("stopped", None), "waiting": ("stopped", "12")}


def test_status_shows_what_slurm_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "JobId=12 JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 Restarts=2"
    monkeypatch.setattr(slurm, "ask", lambda *argv: line)
    note(Path("run"), "12")
    assert main(["status", "12"]) == 0
    assert capsys.readouterr().out == "run  PENDING (Resources)  job 12  requeued 2 times\n"
