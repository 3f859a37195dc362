"""`phalanx logs`: which log is printed, and when following it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from fakes import fake_run

from launcher.cli import main
from launcher.commands import logs
from launcher.slurm.journal import note

# A shell starts what runs in the background with SIGINT ignored, and a child inherits that.
FOLLOW = """
import signal, sys
from launcher.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["logs", "run", "--follow"]))
"""
pytestmark = pytest.mark.usefixtures("no_slurm")


def test_logs_prints_the_newest_attempt_that_has_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    folder = fake_run("run")
    newest = folder / "launch" / "attempt-10" / "machine-1"
    newest.mkdir(parents=True)
    (newest / "rank-1.log").write_text("a line of rank 1\n")
    assert main(["logs", "run", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "a line of rank 1\n"
    assert main(["logs", "run"]) == 0
    assert capsys.readouterr().out == "step 1/4\nstep 2/4\n"
    assert main(["logs", "run", "--rank", "7"]) == 2
    message = capsys.readouterr().err
    assert message.endswith("there is no log of rank 7 yet. There are logs of: 0, 1.\n")


def follow() -> subprocess.Popen[str]:
    """Start `phalanx logs run --follow`. Ctrl-C reaches it also if this process ignores SIGINT."""
    return subprocess.Popen(
        [sys.executable, "-c", FOLLOW], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_log_is_followed_to_the_end_of_the_run(held: subprocess.Popen[str]) -> None:
    log = fake_run("run") / "launch" / "attempt-1" / "rank-0.log"
    follower = follow()
    assert follower.stdout is not None
    assert [follower.stdout.readline() for _ in range(2)] == ["step 1/4\n", "step 2/4\n"]
    with log.open("a") as file:
        file.write("step 3/4\n")
    assert follower.stdout.readline() == "step 3/4\n"
    os.kill(held.pid, signal.SIGKILL)
    out, _ = follower.communicate(timeout=60)
    assert (follower.returncode, out) == (0, "")


@pytest.mark.parametrize(("job", "looks"), [(None, 5), ("7", 1)])
def test_only_the_state_of_a_job_is_not_read_in_every_round(
    monkeypatch: pytest.MonkeyPatch, job: str | None, looks: int
) -> None:
    folder, seen = fake_run("run"), []
    if job is not None:
        note(folder, job)
    monkeypatch.setattr(logs, "FOLLOW_SECONDS", 0.0)
    monkeypatch.setattr(logs, "_is_active", lambda folder: not seen.append(folder))
    rounds = logs._logs(folder, 0, follow=True)
    for _ in range(5):
        next(rounds)
    assert len(seen) == looks


def test_a_log_is_not_followed_without_a_reader(held: subprocess.Popen[str]) -> None:
    """`phalanx logs run --follow | head -1`: it ends although the run continues and writes no more."""
    fake_run("run")
    follower = follow()
    assert follower.stdout is not None and follower.stdout.readline() == "step 1/4\n"
    follower.stdout.close()
    assert follower.stderr is not None and "Traceback" not in follower.stderr.read()
    assert follower.wait(60) == 0


def test_ctrl_c_ends_a_log_that_is_followed(held: subprocess.Popen[str]) -> None:
    fake_run("run")
    follower = follow()
    assert follower.stdout is not None and follower.stdout.readline() == "step 1/4\n"
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130 and "Traceback" not in err
