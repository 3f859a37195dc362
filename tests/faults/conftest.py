"""Runs with planted faults, and small disks for them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def small_disk(bench: Bench) -> Iterator[Callable[[str, int], Path]]:
    """small_disk(name, bytes): mount a small file system at that run's folder."""
    mounted: list[Path] = []

    def mount(name: str, size: int) -> Path:
        if os.geteuid() != 0:
            pytest.skip("a tmpfs needs root")
        folder = bench.root / name
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
