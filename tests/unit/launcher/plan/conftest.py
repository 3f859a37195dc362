"""Fixtures of the plan: the run that flags describe, with its topology and its backend, and golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import machine

from launcher.config import Run, load_run
from launcher.plan.backend import Backend, resolve_backend
from launcher.plan.topology import Hardware, Topology, resolve_topology

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("PHALANX_GOLDEN") == "write"
CPU = machine()


@pytest.fixture
def asked(work: Path) -> Callable[..., Run]:
    """`asked(batch_size=8, ...)` is a run with these flags."""

    def make(**flags: object) -> Run:
        given = {"trainer": "sft", "model": "model", "project_name": "run", **flags}
        return load_run(None, {name: str(value) for name, value in given.items()})

    return make


@pytest.fixture
def resolve(asked: Callable[..., Run], packages: object) -> Callable[..., tuple[Run, Topology, Backend]]:
    """`resolve(hardware, zero_stage=2, ...)` is such a run, its topology and its backend."""

    def decide(hardware: Hardware = CPU, **flags: object) -> tuple[Run, Topology, Backend]:
        run = asked(**{"main_process_port": "23456", **flags})
        topology = resolve_topology(run.launch, hardware, {})
        return run, topology, resolve_backend(run, topology)

    return decide


@pytest.fixture
def same_as_golden() -> Callable[[str, str], None]:
    """`same_as_golden(name, text)` compares a text with the file golden/NAME, next to this file.

    After an intended change: PHALANX_GOLDEN=write pytest tests/unit/launcher/plan
    """

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if WRITE:
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs"

    return check
