"""A run whose terminal or pipe goes away: it continues, or saves and stops, and its exit code says which.

The launcher is a real one. Its rank is a rank without torch: it writes a step to its log, and waits for the
file `go` or for a signal.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import wait_for
from terminals import INTERRUPT, Terminal

from trainers.config.errors import SAVED

LAUNCHER = """
import sys
from launcher.cli import main
from launcher.supervise import attempt
attempt.build_command = lambda run, topology, backend, files: [sys.executable, "rank.py", str(files.config)]
sys.exit(main(sys.argv[1:]))
"""
RANK = """
import sys, time
from pathlib import Path
from trainers.rank.process import run_rank
from trainers.rank.signals import stop

def main():
    stop.training()
    print("step 1", flush=True)
    while not stop.requested and not Path("go").exists():
        time.sleep(0.01)
    print("step 2", flush=True)
    print("a warning of a library", file=sys.stderr, flush=True)
    if stop.requested:
        stop.saved = "saved at step 2"
    else:
        Path("trained").touch()
    return 0

sys.exit(run_rank(main))
"""
TRAIN = ["train", "c.yaml", "--num-processes", "1", "--distributed-backend", "none", "--start", "accelerate"]
Start = Callable[..., subprocess.Popen[str]]
# What a test looks at runs as a launcher with a rank, and as a rank that a user started by hand.
SUBJECTS = {
    "launcher": [sys.executable, "launch.py", *TRAIN],
    "rank by hand": [sys.executable, "rank.py"],
}


@pytest.fixture(autouse=True)
def scripts(work: Path) -> None:
    Path("launch.py").write_text(LAUNCHER)
    Path("rank.py").write_text(RANK)
    Path("c.yaml").write_text("task: llm-sft\nbase_model: model\nproject_name: run\ndata: {path: data}\n")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> list[str]:
    return SUBJECTS[request.param]


def in_step_1() -> bool:
    """Whether the rank of the launcher waits in its first step."""
    log = Path("run/launch/attempt-1/rank-0.log")
    return log.exists() and "step 1" in log.read_text()


def ended(process: subprocess.Popen[str]) -> int:
    """Return the exit code, and check that the run did what the code says."""
    code = process.wait(60)
    assert Path("trained").exists() == (code == 0)
    return code


def test_a_run_goes_on_without_the_reader_of_its_pipe(subject: list[str]) -> None:
    """The reader leaves in the middle, as head does."""
    process = subprocess.Popen(subject, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while process.stdout.readline() != "step 1\n":
        assert process.poll() is None
    process.stdout.close()
    Path("go").touch()
    assert ended(process) == 0


def test_a_run_begins_without_a_reader(subject: list[str]) -> None:
    Path("go").touch()
    ours, theirs = os.pipe()
    os.close(ours)
    with subprocess.Popen(subject, text=True, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        assert ended(process) == 0


def test_a_run_goes_on_when_the_disk_of_its_output_is_full(subject: list[str]) -> None:
    Path("go").touch()
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(subject, text=True, stdout=full, stderr=subprocess.PIPE)
        assert process.stderr is not None and "No space left on device" in process.stderr.read()
        assert ended(process) == 0
    process.stderr.close()


def test_a_person_is_told_where_the_output_is() -> None:
    """stdout went to head, and stderr is still the terminal."""
    process = subprocess.Popen(
        SUBJECTS["launcher"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    wait_for(in_step_1)
    Path("go").touch()
    err = process.stderr.read()
    assert ended(process) == 0
    assert err.count("warning: nothing takes stdout any more; the run continues") == 1
    assert "run/launch/attempt-1/rank-0.log" in err
    process.stderr.close()


def test_a_closed_terminal_saves_and_stops(subject: list[str], terminal: Terminal) -> None:
    process = terminal.start(subject)
    terminal.wait_for("step 1")
    terminal.close()
    assert ended(process) == SAVED


def test_a_run_under_nohup_goes_on_without_its_terminal(subject: list[str], terminal: Terminal) -> None:
    process = terminal.start(subject, nohup=True)
    terminal.wait_for("step 1")
    terminal.close()
    Path("go").touch()
    assert ended(process) == 0


def test_the_program_nohup_does_so_too(subject: list[str], terminal: Terminal) -> None:
    process = terminal.start(["nohup", *subject])
    wait_for(lambda: Path("nohup.out").exists() and "step 1" in Path("nohup.out").read_text())
    terminal.close()
    Path("go").touch()
    assert ended(process) == 0
    assert "step 2" in Path("nohup.out").read_text()


def test_a_hang_up_that_comes_twice_does_not_end_the_save(terminal: Terminal) -> None:
    """A shell passes SIGHUP on to its jobs, which have it from the kernel already."""
    process = terminal.start(SUBJECTS["launcher"])
    terminal.wait_for("step 1")
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
    assert ended(process) == SAVED


def test_ctrl_c_in_a_pipeline_saves_and_stops(subject: list[str], terminal: Terminal) -> None:
    """SIGINT reaches tee too, which ends at once."""
    line = f"trap : INT; {shlex.join(subject)} 2>&1 | tee log; echo ${{PIPESTATUS[@]}} >codes"
    shell = terminal.start(["bash", "-c", line])
    terminal.wait_for("step 1")
    terminal.type(INTERRUPT)
    shell.wait(60)
    assert Path("codes").read_text().split() == [str(SAVED), str(128 + signal.SIGINT)]
