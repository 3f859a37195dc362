"""`phalanx status | logs | cancel` on folders that runs left; tests/slurm has a real SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands.logs import _goes_on
from launcher.config import load_run
from launcher.slurm import job as slurm
from launcher.slurm.journal import note, note_end
from launcher.slurm.run_state import read_status
from trainers.storage.run_folder import PROGRESS

HOLD = """
import sys, time
from pathlib import Path
from trainers.storage.run_folder import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def run_in(folder: str, **progress: object) -> Path:
    """A folder that a run was started in."""
    path = Path(folder)
    attempt = path / "launch" / "attempt-1"
    attempt.mkdir(parents=True)
    (attempt / "command.txt").write_text("accelerate launch\n")
    (attempt / "rank-0.log").write_text("step 1/4\nstep 2/4\n")
    if progress:
        (path / PROGRESS).write_text(json.dumps(progress))
    return path


@pytest.fixture
def held() -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder `run`, as its launcher does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, "run"], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    run_in("run", step=2, max_steps=4, loss=1.25, tokens_per_second=812.4, seconds_left=3700)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  stopped  step 2/4  loss 1.2500  812 tokens/s\n"


def test_a_run_that_goes_on(held: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_in("run", step=2, max_steps=4, loss=1.25, seconds_left=3700)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  running  step 2/4  loss 1.2500  ETA 1:01:40\n"
    assert main(["cancel", "run"]) == 0
    assert capsys.readouterr().out == f"run: process {held.pid} saves and ends\n"
    assert held.wait(timeout=30) == -signal.SIGTERM


def test_a_run_that_ended() -> None:
    folder = run_in("run")
    (folder / "run.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert read_status(folder).state == "ended"


def test_all_runs_below(capsys: pytest.CaptureFixture[str]) -> None:
    run_in("runs/a")
    run_in("b")
    note(Path("waiting"), "12")
    Path("none/launch").mkdir(parents=True)
    assert main(["status", "--json"]) == 0
    told = {one["run"]: (one["state"], one["job"]) for one in json.loads(capsys.readouterr().out)}
    assert told == {"b": ("stopped", None), "runs/a": ("stopped", None), "waiting": ("stopped", "12")}


def test_what_slurm_says_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "JobId=12 JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 Restarts=2"
    monkeypatch.setattr(slurm, "ask", lambda *argv: line)
    note(Path("run"), "12")
    assert main(["status", "12"]) == 0
    assert capsys.readouterr().out == "run  PENDING (Resources)  job 12  requeued 2 times\n"


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_what_is_no_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "4711"]) == 2
    assert "error: 4711: no run lies there, and no run below" in capsys.readouterr().err


def test_the_log_of_a_rank_in_the_newest_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_in("run")
    newest = folder / "launch" / "attempt-10" / "machine-1"
    newest.mkdir(parents=True)
    (newest / "rank-1.log").write_text("of rank 1\n")
    assert main(["logs", "run", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "of rank 1\n"
    assert main(["logs", "run"]) == 0
    assert capsys.readouterr().out == "step 1/4\nstep 2/4\n"
    assert main(["logs", "run", "--rank", "7"]) == 2
    assert "there is no log of rank 7 yet" in capsys.readouterr().err


def test_a_log_is_followed_to_the_end_of_the_run(held: subprocess.Popen[str]) -> None:
    log = run_in("run") / "launch" / "attempt-1" / "rank-0.log"
    argv = [sys.executable, "-m", "launcher", "logs", "run", "--follow"]
    follower = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert follower.stdout is not None
    assert [follower.stdout.readline() for _ in range(2)] == ["step 1/4\n", "step 2/4\n"]
    with log.open("a") as file:
        file.write("step 3/4\n")
    assert follower.stdout.readline() == "step 3/4\n"
    os.kill(held.pid, signal.SIGKILL)
    assert follower.wait(timeout=60) == 0


# --------------------------------------------------------------------------------------- inside of a job


def test_the_job_of_a_task() -> None:
    assert slurm.this_job({"SLURM_JOB_ID": "7"}) is None, "the batch script, or a shell of salloc"
    assert slurm.this_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == "7"
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.this_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", **array}) == "5_2"


def test_the_end_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert slurm.end_time({}) is None
    assert slurm.end_time({**task, "SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    asked: list[tuple[str, ...]] = []
    for told, end in (("2026-01-02T03:04:05", (2026, 1, 2, 3, 4, 5)), ("N/A", None), ("", None)):
        monkeypatch.setattr(slurm, "ask", lambda *argv, told=told: asked.append(argv) or told)
        found = slurm.end_time(task)
        assert (found and time.localtime(found)[:6]) == end
    assert asked[0] == ("squeue", "-h", "-j", "7", "-o", "%e")


@pytest.mark.parametrize(
    ("known", "comes_back"),
    [
        ("JobState=RUNNING Requeue=1 BatchFlag=1", True),
        ("JobState=RUNNING Requeue=1 BatchFlag=2", True),
        ("JobState=RUNNING Requeue=0 BatchFlag=1", False),
        ("JobState=RUNNING Requeue=1 BatchFlag=0", False),
        ("JobState=CANCELLED Requeue=1 BatchFlag=1", False),
    ],
)
def test_which_job_comes_back(monkeypatch: pytest.MonkeyPatch, known: str, comes_back: bool) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "ask", lambda *argv: asked.append(argv) or known)
    assert slurm.requeue("7") is comes_back
    assert (("scontrol", "requeue", "7") in asked) is comes_back


def test_a_job_that_is_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, makes_room in (("None", False), ("2026-01-02T03:04:05", True)):
        monkeypatch.setattr(slurm, "ask", lambda *_, told=told: f"JobId=7 PreemptTime={told} Requeue=1")
        assert slurm.preempted("7") is makes_room


def test_what_all_tasks_of_a_start_know() -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert slurm.this_start({}) is None
    assert slurm.this_start(task) == "7.0.0"
    assert slurm.this_start({**task, "SLURM_RESTART_COUNT": "2"}) == "7.0.2"


def test_a_job_that_came_back_goes_on_with_what_is_its_own() -> None:
    """Before its first start had the folder, another's run lay there, to be overwritten."""
    Path("c.yaml").write_text("task: llm-sft\nbase_model: m\nproject_name: run\ndata: {path: data}\n")
    run_in("run")
    run = load_run(Path("c.yaml"), {"overwrite": "true"})
    environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}
    assert slurm.resumed_by_slurm(run, environ) is run
    note(Path("run"), "7")
    assert slurm.resumed_by_slurm(run, environ) is run
    note(Path("run"), "7", 0)
    train = slurm.resumed_by_slurm(run, environ).train
    assert (train.resume, train.overwrite) == (True, False)
    assert slurm.resumed_by_slurm(run, {"SLURM_RESTART_COUNT": "1"}) is run, (
        "a variable that somebody exported"
    )


# ----------------------------------------------------------------------------- cancel, where SLURM answers


class Controller:
    """What scontrol, scancel and squeue are asked, and what they say of these jobs."""

    def __init__(self, **states: str) -> None:
        self.states = {name.removeprefix("job"): state for name, state in states.items()}
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *argv: str) -> str:
        if argv[:2] == ("scontrol", "show"):
            if (state := self.states.get(argv[-1])) is None:
                raise slurm.NoSlurm("scontrol: Invalid job id specified")
            return f"JobId={argv[-1]} JobState={state} Reason=None"
        if argv[0] == "squeue":
            return f"{argv[4]}.0" if self.states[argv[4]] == "RUNNING" else ""
        self.asked.append(argv)
        return ""


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Controller]:
    def answer(**states: str) -> Controller:
        made = Controller(**states)
        monkeypatch.setattr(slurm, "ask", made)
        monkeypatch.setattr("launcher.commands.cancel.ask", made)
        for job in made.states:
            note(Path("run"), job)
        return made

    return answer


def test_all_jobs_of_a_run_are_cancelled(
    controller: Callable[..., Controller], capsys: pytest.CaptureFixture[str]
) -> None:
    told = controller(job1="COMPLETED", job2="RUNNING", job3="PENDING")
    assert main(["cancel", "run"]) == 0
    assert told.asked == [
        ("scontrol", "update", "JobId=2", "Requeue=0"),
        ("scancel", "--signal=TERM", "2"),
        ("scancel", "3"),
    ]
    assert capsys.readouterr().out == "run: job 2 saves and ends\nrun: job 3 was PENDING and is cancelled\n"


@pytest.mark.parametrize(("job", "asked"), [("1", []), ("3", [("scancel", "3")])])
def test_a_job_that_is_named_is_cancelled_alone(
    controller: Callable[..., Controller], job: str, asked: list[tuple[str, ...]]
) -> None:
    told = controller(job1="COMPLETED", job2="RUNNING", job3="PENDING")
    assert main(["cancel", job]) == 0
    assert told.asked == asked


def test_a_job_that_is_still_setting_up_has_nothing_to_save(
    controller: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = controller(job2="RUNNING")
    monkeypatch.setattr("launcher.commands.cancel._has_begun", lambda job: False)
    assert main(["cancel", "run"]) == 0
    assert told.asked == [("scancel", "2")]


def test_a_controller_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is taken for its end."""
    Path("bin").mkdir()
    Path("bin/scontrol").write_text(
        "#!/bin/sh\necho 'Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"
    )
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:/bin")
    note(run_in("run"), "7")
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out.startswith("run  UNKNOWN (scontrol: Unable to contact slurm controller")
    assert _goes_on(Path("run"))
    assert main(["cancel", "run"]) == 2


def test_a_job_that_goes_on_after_the_run(
    controller: Callable[..., Controller], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its next run, or the shell of an interactive job, is not this run."""
    told = controller(job2="RUNNING")
    note(run_in("run"), "2", 0)
    note_end(Path("run"), "2")
    assert main(["status", "run"]) == 0 and main(["cancel", "run"]) == 0
    assert told.asked == []
    assert capsys.readouterr().out == "run  stopped  job 2\nrun: it does not run\n"
    note(Path("run"), "2", 0)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  RUNNING  job 2\n"


def test_ctrl_c_ends_a_log_that_is_followed(held: subprocess.Popen[str]) -> None:
    run_in("run")
    argv = [sys.executable, "-m", "launcher", "logs", "run", "--follow"]
    follower = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert follower.stdout is not None and follower.stdout.readline() == "step 1/4\n"
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130 and "Traceback" not in err
