"""The commands of the pages run as they are written, in a folder that looks like a checkout.

The tiny model replaces the model of the demo, at the same path. The README's run `my-run` is made once, and
the commands that need a finished run use it. The process that docs/surviving.md starts serves the runs of
this file. tests/unit/test_docs.py checks the commands that cannot run here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pages import fences
from places import REPO
from ranks import environment

from trainers.rank.protocol import WARM

RUNNING = {fence: fence.commands for fence in fences("bash") if fence.marker is None}
COMMANDS = [pytest.param(line, id=f"{fence}: {line[:40]}") for fence in RUNNING for line in RUNNING[fence]]
KEEP = "python -m trainers.warm --keep "
TRAIN = "phalanx train examples/demo.yaml --num-processes 2 --project-name my-run"
SERVERS = {  # commands that run until they are ended -> what shows that they work
    "tensorboard": re.compile(r"http://\S+:\d+/"),
}

Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_model) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "accelerate_configs", "deepspeed_configs", "slurm"):
        shutil.copytree(REPO / name, root / name)
    shutil.copytree(tiny_model, root / ".demo" / "SmolLM2-135M-Instruct")
    return root


@pytest.fixture(scope="module")
def environ(checkout) -> dict[str, str]:
    """The environment of the commands: ~ is the checkout, and no variable sets the number of threads."""
    (checkout / "user").mkdir(mode=0o700)
    given = environment(checkout / "cache") | {
        "HOME": str(checkout),
        "XDG_RUNTIME_DIR": str(checkout / "user"),
    }
    return {name: value for name, value in given.items() if name not in (WARM, "OMP_NUM_THREADS")}


@pytest.fixture(scope="module")
def kept(checkout, environ) -> Iterator[subprocess.Popen[bytes]]:
    """The process of docs/surviving.md that imports the libraries for many runs."""
    [command] = [line for lines in RUNNING.values() for line in lines if line.startswith(KEEP)]
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=checkout, env=environ)
    try:
        while not (checkout / "user" / "phalanx.socket").exists():
            assert process.poll() is None, "the process that imports the libraries ended"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def ran(checkout, environ, kept) -> Run:
    """`ran(command)` runs a command once, as in a shell. It trains my-run before, if the command needs it."""
    done: dict[str, subprocess.CompletedProcess[str]] = {}
    warm = environ | {WARM: str(checkout / "user" / "phalanx.socket")}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        if "my-run" in command and command != TRAIN:
            run(TRAIN)
        if command not in done:
            shutil.rmtree(checkout / ".demo" / "run", ignore_errors=True)
            done[command] = subprocess.run(
                ["bash", "-c", command], cwd=checkout, env=warm, text=True, capture_output=True, timeout=300
            )
        if command == TRAIN and not (checkout / "my-run" / "checkpoint-500").exists():
            newest = max((checkout / "my-run").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            shutil.copytree(newest, checkout / "my-run" / "checkpoint-500")  # a page names this one
        return done[command]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_pages_works(checkout, environ, kept, ran, command):
    program = command.split()[0]
    if command.startswith(KEEP):
        assert kept.poll() is None
    elif program in SERVERS:
        pytest.importorskip(program)
        assert SERVERS[program].search(first_lines(command, checkout, environ, SERVERS[program]))
    else:
        done = ran(command)
        assert done.returncode == 0, done.stdout + done.stderr
        if named := re.search(r"--project-name (\S+)", command):
            assert (checkout / named[1] / "run.json").exists()
            assert (checkout / named[1] / "metrics.jsonl").exists()


def first_lines(command: str, folder: Path, environ: dict[str, str], wanted: re.Pattern[str]) -> str:
    """Start a command that runs until it is ended. Return its output up to the line that is wanted."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if wanted.search(line):
                break
        return "".join(lines)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def test_the_process_that_keeps_the_imports_has_one_thread(kept):
    """A fork would lose the others (docs/upgrading.md: numpy and pyarrow)."""
    assert os.listdir(f"/proc/{kept.pid}/task") == [str(kept.pid)]


def test_a_run_of_the_pages_is_forked(ran):
    done = ran(TRAIN)
    assert "the run imports the libraries itself" not in done.stdout
    assert "start: accelerate launch" not in done.stdout
