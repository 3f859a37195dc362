"""The state of a run, from its folder and from SLURM. tests/slurm uses a real SLURM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import Controller
from fakes import fake_run

from launcher.cli import main
from launcher.commands.logs import _is_active
from launcher.slurm.journal import note, note_end
from launcher.slurm.run_state import read_status

pytestmark = pytest.mark.usefixtures("no_slurm")


def test_a_run_with_a_record_and_a_model_has_ended() -> None:
    folder = fake_run("run")
    (folder / "run.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert read_status(folder).state == "ended"


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_name_that_is_not_a_run_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "4711"]) == 2
    assert "error: 4711: it is not a run's folder, and no run below" in capsys.readouterr().err


def test_without_an_answer_the_state_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run does not count as ended."""
    Path("bin").mkdir()
    Path("bin/scontrol").write_text(
        "#!/bin/sh\necho 'Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:/bin")
    note(fake_run("run"), "7")
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out.startswith("run  UNKNOWN (scontrol: Unable to contact slurm controller")
    assert _is_active(Path("run"))
    assert main(["cancel", "run"]) == 2


def test_a_job_may_continue_after_the_run(
    controller: Callable[..., Controller], capsys: pytest.CaptureFixture[str]
) -> None:
    """The next run of the job, or the shell of an interactive job, is not this run."""
    stub = controller(job2="RUNNING")
    note(fake_run("run"), "2", 0)
    note_end(Path("run"), "2")
    assert main(["status", "run"]) == 0 and main(["cancel", "run"]) == 0
    assert stub.asked == []
    assert capsys.readouterr().out == "run  stopped  job 2\nrun: it is not running\n"
    note(Path("run"), "2", 0)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  RUNNING  job 2\n"
