"""The commands: their help, that they import nothing heavy, and that they need no reader of their output."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from fakes import fake_run, listing, run_command
from terminals import Terminal

from launcher.commands import COMMANDS
from trainers.config.errors import DISK_FAILED

HEAVY = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed", "bitsandbytes")
PROBE = f"""
import sys
from launcher.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["schema"],
        ["show", "c.yaml"],
        ["show", "c.yaml", "--json"],
        ["show", "c.yaml", "--num-processes", "2", "--distributed-backend", "fsdp"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(config: Path, argv: list[str]) -> None:
    before = listing(config.parent.parent)
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded:\n"
    assert done.stdout
    assert listing(config.parent.parent) == before


def test_train_imports_nothing_heavy_if_it_refuses_a_config(config: Path) -> None:
    config.write_text(config.read_text().replace("model", "./nowhere"))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "train", "c.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.endswith("loaded:\n")


def test_python_m_launcher_runs_phalanx(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"phalanx {version('phalanx')}\n")


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["--help"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"phalanx {version('phalanx')}\n"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["schema"], 0),  # more than a pipe holds
        (["show", "c.yaml"], 0),
        (["train", "missing.yaml"], 2),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                (["status"], 0),
                (["logs", "other"], 0),
                (["cancel", "other"], 0),
                (["train", "c.yaml", "--no-such-flag"], 2),
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("no_slurm")
def test_a_command_ends_quietly_without_a_reader(config: Path, argv: list[str], code: int) -> None:
    """`phalanx show c.yaml | head`, and a terminal that is gone. The exit code is the usual one."""
    fake_run("other")
    ours, pipe = os.pipe()
    os.close(ours)
    with Terminal() as terminal:
        gone = os.dup(terminal.theirs)
        terminal.close()
    command = [sys.executable, "-m", "launcher", *argv]
    processes = [
        subprocess.Popen(command, text=True, stdout=lost, stderr=stderr)
        for lost, stderr in ((pipe, subprocess.PIPE), (gone, subprocess.PIPE), (gone, pipe))
    ]
    said = [process.communicate()[1] or "" for process in processes]
    os.close(gone)
    os.close(pipe)
    assert [process.returncode for process in processes] == [code] * 3
    assert [text for text in said if "Traceback" in text] == []


@pytest.mark.parametrize("argv", [["schema"], ["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_a_result_that_a_full_disk_loses_is_an_error(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "launcher", *argv]
        done = subprocess.run(command, text=True, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (DISK_FAILED, 1)
    assert "stdout: No space left on device" in done.stderr
