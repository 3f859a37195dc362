"""Fixtures for the unit tests of both packages."""

from __future__ import annotations

from pathlib import Path

import pytest
from configs import Read

from launcher.config import Run, load_run


@pytest.fixture
def read_config(work: Path) -> Read:
    """`read_config(text, **flags)` resolves the text of a config file, with flags."""

    def load(text: str, **flags: str) -> Run:
        (work / "c.yaml").write_text(text)
        return load_run(Path("c.yaml"), flags)

    return load
