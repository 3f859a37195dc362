"""The commands: their help, and that they import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from fakes import listing, run_command

from launcher.commands import COMMANDS

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
