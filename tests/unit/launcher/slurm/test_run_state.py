"""`phalanx status`, `logs` and `cancel` on the folders of runs. tests/slurm uses a real SLURM."""

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
from launcher.commands.logs import _is_active
from launcher.config import load_run
from launcher.slurm import job as slurm
from launcher.slurm.journal import note, note_end
from launcher.slurm.run_state import read_status
from trainers.storage.run_folder import PROGRESS

HOLD = """
import sys, time
from pathlib import Path
from trainers.storage.run_folder import lock_folder
lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def run_in(folder: str, **progress: object) -> Path:
    """Create a folder in which a run was started."""
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
    """Yield a process that holds the lock on the folder `run`, as a launcher does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, "run"], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_status_of_a_stopped_run(capsys: pytest.CaptureFixture[str]) -> None:
    run_in("run", step=2, max_steps=4, loss=1.25, tokens_per_second=812.4, seconds_left=3700)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  stopped  step 2/4  loss 1.2500  812 tokens/s\n"


def test_status_and_cancel_of_a_running_run(
    held: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_in("run", step=2, max_steps=4, loss=1.25, seconds_left=3700)
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out == "run  running  step 2/4  loss 1.2500  ETA 1:01:40\n"
    assert main(["cancel", "run"]) == 0
    assert capsys.readouterr().out == f"run: process {held.pid} saves and ends\n"
    assert held.wait(timeout=30) == -signal.SIGTERM


def test_a_run_with_a_record_and_a_model_has_ended() -> None:
    folder = run_in("run")
    (folder / "run.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert read_status(folder).state == "ended"


def test_status_lists_all_runs_below_the_working_folder(capsys: pytest.CaptureFixture[str]) -> None:
    run_in("runs/a")
    run_in("b")
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


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_name_that_is_not_a_run_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "4711"]) == 2
    assert "error: 4711: it is not a run's folder, and no run below" in capsys.readouterr().err


def test_logs_prints_the_newest_attempt_that_has_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_in("run")
    newest = folder / "launch" / "attempt-10" / "machine-1"
    newest.mkdir(parents=True)
    (newest / "rank-1.log").write_text("a line of rank 1\n")
    assert main(["logs", "run", "--rank", "1"]) == 0
    assert capsys.readouterr().out == "a line of rank 1\n"
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


def test_the_job_of_a_task() -> None:
    assert slurm.this_job({"SLURM_JOB_ID": "7"}) is None, "the batch script, or a shell of salloc"
    assert slurm.this_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == "7"
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.this_job({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", **array}) == "5_2"


def test_the_end_of_the_job_is_read_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert slurm.end_time({}) is None
    assert slurm.end_time({**task, "SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    asked: list[tuple[str, ...]] = []
    for answer, end in (("2026-01-02T03:04:05", (2026, 1, 2, 3, 4, 5)), ("N/A", None), ("", None)):
        monkeypatch.setattr(slurm, "ask", lambda *argv, answer=answer: asked.append(argv) or answer)
        found = slurm.end_time(task)
        assert (found and time.localtime(found)[:6]) == end
    assert asked[0] == ("squeue", "-h", "-j", "7", "-o", "%e")


@pytest.mark.parametrize(
    ("known", "requeued"),
    [
        ("JobState=RUNNING Requeue=1 BatchFlag=1", True),
        ("JobState=RUNNING Requeue=1 BatchFlag=2", True),
        ("JobState=RUNNING Requeue=0 BatchFlag=1", False),
        ("JobState=RUNNING Requeue=1 BatchFlag=0", False),
        ("JobState=CANCELLED Requeue=1 BatchFlag=1", False),
    ],
)
def test_which_jobs_are_requeued(monkeypatch: pytest.MonkeyPatch, known: str, requeued: bool) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "ask", lambda *argv: asked.append(argv) or known)
    assert slurm.requeue("7") is requeued
    assert (("scontrol", "requeue", "7") in asked) is requeued


def test_a_job_with_a_preempt_time_is_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    for when, preempted in (("None", False), ("2026-01-02T03:04:05", True)):
        monkeypatch.setattr(slurm, "ask", lambda *_, when=when: f"JobId=7 PreemptTime={when} Requeue=1")
        assert slurm.preempted("7") is preempted


def test_the_id_of_a_start_has_the_restart_count() -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert slurm.this_start({}) is None
    assert slurm.this_start(task) == "7.0.0"
    assert slurm.this_start({**task, "SLURM_RESTART_COUNT": "2"}) == "7.0.2"


def test_a_requeued_job_resumes_only_its_own_run() -> None:
    """Until the job has started in the folder, the run there is another one, which may be overwritten."""
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
    assert slurm.resumed_by_slurm(run, {"SLURM_RESTART_COUNT": "1"}) is run, "a variable that a user exported"


class Controller:
    """A stub of scontrol, scancel and squeue, which knows these jobs and records the other commands."""

    def __init__(self, **states: str) -> None:
        self.states = {name.removeprefix("job"): state for name, state in states.items()}
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *argv: str) -> str:
        if argv[:2] == ("scontrol", "show"):
            if (state := self.states.get(argv[-1])) is None:
                raise slurm.SlurmError("scontrol: Invalid job id specified")
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
    note(run_in("run"), "7")
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out.startswith("run  UNKNOWN (scontrol: Unable to contact slurm controller")
    assert _is_active(Path("run"))
    assert main(["cancel", "run"]) == 2


def test_a_job_may_continue_after_the_run(
    controller: Callable[..., Controller], capsys: pytest.CaptureFixture[str]
) -> None:
    """The next run of the job, or the shell of an interactive job, is not this run."""
    stub = controller(job2="RUNNING")
    note(run_in("run"), "2", 0)
    note_end(Path("run"), "2")
    assert main(["status", "run"]) == 0 and main(["cancel", "run"]) == 0
    assert stub.asked == []
    assert capsys.readouterr().out == "run  stopped  job 2\nrun: it is not running\n"
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
