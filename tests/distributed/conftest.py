"""Real ranks on the CPU. A training run is made once a session and shared by all tests that look at it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import HERE, Bench, Finished, environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("distributed")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_masked_model: Path) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    data = root / "data"
    data.mkdir()
    for split, count in (("train", 40), ("valid", 4)):
        rows = [
            {
                "prompt": f"What is {i} plus {i}?",
                "completion": f"The answer to the question is {2 * i}. " * (1 + i % 3),
                "label": i % 3 != 0,
                "chosen": f"The answer to the question is {2 * i}. " * (1 + i % 3),
                "rejected": f"Ranks are {i}. " * (1 + i % 4),
            }
            for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environ = environment(root / "cache")
    return Bench(root, tiny_model, tiny_masked_model, environ)


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
