"""Fixtures: a working folder of its own for each test, invented hardware, and one real tiny model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import fake_model, machine, write_rows

from launcher import backend, topology
from launcher.topology import Hardware

# Of the site's environment, what a run would read.
_SITE = re.compile(r"(SLURM|HF|HUGGING_FACE|TRANSFORMERS|PHALANX)_.*|CUDA_VISIBLE_DEVICES")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real two-layer model with its tokenizer (imports torch: seconds)."""
    from tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_masked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real two-layer masked LM with its tokenizer."""
    from tiny import build_tiny_masked_model

    return build_tiny_masked_model(tmp_path_factory.mktemp("tiny") / "masked")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `model/` and `data/train.jsonl`; no hub cache, no SLURM, no token."""
    for name in list(os.environ):
        if _SITE.fullmatch(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    fake_model(folder / "model")
    write_rows(folder / "data" / "train.jsonl", {"text": "one"}, {"text": "two"})
    return folder


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hardware], None]:
    """`hardware(machine(gpus=8))` is what the launcher then finds; one CPU until it is called."""

    def found(this: Hardware) -> None:
        monkeypatch.setattr(topology, "detect_hardware", lambda: this)

    found(machine())
    return found


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`packages(without="wandb")`: the launcher finds every optional package but these."""

    def present(without: tuple[str, ...] | str = ()) -> None:
        missing = (without,) if isinstance(without, str) else without
        monkeypatch.setattr(backend, "installed", lambda name: name not in missing)

    present()
    return present
