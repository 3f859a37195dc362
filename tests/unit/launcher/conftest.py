"""Fixtures of the launcher: a config file, SLURM's commands, and a process that holds a run's folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import Controller, Submitted, write_sbatch
from processes import lock_holder

from launcher.slurm import job as slurm
from launcher.slurm.journal import note

CONFIG = """\
task: llm-sft
base_model: model
project_name: run
data:
  path: data
params:
  lr: 0.5
  batch_size: 3
"""
FOR_SLURM = """\
task: llm-sft
base_model: model
project_name: run
data: {path: data}
launch: {}
slurm:
  partition: gpu
"""


@pytest.fixture
def config(work: Path, hardware: object) -> Path:
    """The file c.yaml, on a machine without GPUs."""
    (work / "c.yaml").write_text(CONFIG)
    return work / "c.yaml"


@pytest.fixture
def submitted(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """c.yaml with a section slurm, and a stub of sbatch. submitted() returns the arguments of each call."""
    Path("c.yaml").write_text(FOR_SLURM)
    calls = write_sbatch(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return calls


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    """A working folder on a machine without SLURM's commands."""
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def held(work: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of the folder `run`."""
    with lock_holder(Path("run")) as process:
        yield process


@pytest.fixture
def controller(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Controller]:
    """`controller(job2="RUNNING")`: the run `run` has these jobs, and SLURM's commands know them."""

    def answer(**states: str) -> Controller:
        made = Controller(**states)
        monkeypatch.setattr(slurm, "ask", made)
        monkeypatch.setattr("launcher.commands.cancel.ask", made)
        for job in made.states:
            note(Path("run"), job)
        return made

    return answer
