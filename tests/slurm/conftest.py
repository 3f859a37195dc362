"""One cluster for the session, and a site: a folder that the nodes share, with rows and a site file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from jobsite import Site
from planted import PLANT

REASON = missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here:
            item.add_marker("slurm")
            item.add_marker(pytest.mark.skipif(REASON is not None, reason=str(REASON)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Site:
    folder = tmp_path_factory.mktemp("site") / "a site"
    (folder / "data").mkdir(parents=True)
    rows = [{"prompt": f"What is {i}?", "completion": f"The answer is {i}."} for i in range(64)]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = folder / "site.env"
    env.write_text(
        f"export PATH={Path(sys.executable).parent}:{os.environ['PATH']}\n"
        f'export PHALANX_CACHE="{folder}/cache" HF_HUB_OFFLINE=1 PYTHONPATH={PLANT}\n'
    )
    return Site(cluster, folder, tiny_model, {"PHALANX_SITE_ENV": str(env)})
