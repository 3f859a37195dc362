"""One bench of faults for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from planted import Faults
from ranks import Bench


@pytest.fixture(scope="session")
def faults(bench: Bench) -> Iterator[Faults]:
    made = Faults(bench, [], {})
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
            process.communicate()
