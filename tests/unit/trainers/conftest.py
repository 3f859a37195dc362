"""Fixtures for the tests of the trainers: the folder of a finished run, a checkpoint, a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import fake_checkpoint
from saved_run import make_adapter, write_run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of step 5 that verifies."""
    return fake_checkpoint(tmp_path, 5)


@pytest.fixture
def saved_run(tmp_path: Path, tiny_model: Path) -> Path:
    """The folder of a finished run."""
    return write_run(tmp_path / "home" / "my-run", tiny_model)


@pytest.fixture
def saved_adapter(saved_run: Path) -> Path:
    """The folder of the same run with an adapter."""
    return make_adapter(saved_run)
