"""Training in the process of the tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def in_one_thread(one_thread: None) -> None:
    """Train in one thread."""


@pytest.fixture(autouse=True)
def few_objects() -> None:
    """Take what exists before a test, such as the libraries, out of the garbage collector's way.

    accelerate collects garbage at the start of each training, and would look at a million objects each time.
    """
    gc.collect()
    gc.freeze()
