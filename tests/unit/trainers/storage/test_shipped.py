"""The shipped files are in this checkout, and in what pip installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from places import REPO

from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS, SHIPPED, SLURM_SCRIPTS


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [(ACCELERATE_CONFIGS, "*.yaml"), (DEEPSPEED_CONFIGS, "*.json"), (SLURM_SCRIPTS, "*.sh")],
    ids=lambda value: Path(value).name,
)
def test_a_shipped_folder_has_files_and_is_in_the_wheel(folder: Path, pattern: str) -> None:
    assert SHIPPED == REPO
    assert any(folder.glob(pattern))
    wheel = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert folder.relative_to(SHIPPED).as_posix() in wheel["packages"]
