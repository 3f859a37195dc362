"""The fixture that starts runs with planted faults, once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from planted import PLANT, Faults
from ranks import Bench, kept_warm


@pytest.fixture(scope="session")
def faults(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    planted = bench.environ | {"PYTHONPATH": str(PLANT), "PHALANX_FAULT": "{}"}
    with kept_warm(tmp_path_factory.mktemp("warm"), planted) as path:
        made = Faults(bench, path, [], {})
        yield made
        for process in made.started:
            if process.poll() is None:
                process.kill()
                process.communicate()
