"""The benchmarks are tested without a GPU and without a measurement."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from places import REPO


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """Let a test import the benchmarks, which are scripts that import each other by name."""
    folder = REPO / "benchmarks"
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for script in folder.glob("*.py"):
        sys.modules.pop(script.stem, None)
