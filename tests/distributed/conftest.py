"""Real ranks on the CPU. A training run is made once a session and shared by all tests that look at it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ranks import Bench, Finished


@pytest.fixture(scope="session")
def trained(bench: Bench) -> Callable[..., Finished]:
    """trained(backend, mode, trainer): that run, made at the first call."""
    made: dict[tuple[str, str, str], Finished] = {}

    def run(backend: str, mode: str, trainer: str = "sft") -> Finished:
        key = (backend, mode, trainer)
        if key not in made:
            done = bench.train("-".join((trainer, backend, mode)), *bench.flags(*key))
            assert done.code == 0, done.out + done.err
            made[key] = done
        return made[key]

    return run
