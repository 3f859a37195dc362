"""Where a rank computes, as it reads it from torch and from the environment of its launch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import machine

from launcher.config import load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.topology import resolve_topology
from trainers.config.errors import ConfigError
from trainers.config.requirements import AMPERE, check_requirements
from trainers.config.schema import TrainConfig
from trainers.model.place import place_of_rank

READ = ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE")  # fmt: skip
Rank = Callable[..., None]


@pytest.fixture
def rank(packages: object, monkeypatch: pytest.MonkeyPatch) -> Rank:
    """`rank(capability=(8, 0), WORLD_SIZE="2")` is the torch and the environment of this rank."""

    def become(capability: tuple[int, int] | None = None, **environ: str) -> None:
        cuda = SimpleNamespace(
            is_available=lambda: capability is not None, get_device_capability=lambda: capability
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        for name in READ:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    return become


ZERO = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("none", 1, None)),
        ({"WORLD_SIZE": "1"}, ("none", 1, None)),
        ({"WORLD_SIZE": "4"}, ("ddp", 4, None)),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "false"}, ("ddp", 4, None)),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, ("fsdp", 4, None)),
        ({"ACCELERATE_USE_FSDP": "True"}, ("fsdp", 1, None)),
        (ZERO, ("deepspeed", 2, 2)),  # accelerate's default stage
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, ("deepspeed", 2, 1)),
        # Without ACCELERATE_USE_DEEPSPEED the stage is a left-over of the shell.
        ({"WORLD_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("ddp", 2, None)),
    ],
    ids=str,
)
def test_the_backend_is_that_of_the_launch(
    rank: Rank, environ: dict[str, str], expected: tuple[str, int, int | None]
) -> None:
    rank(**environ)
    found = place_of_rank()
    assert (found.backend, found.processes, found.zero_stage) == expected


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_zero_stage_is_that_of_the_deepspeed_file(rank: Rank, tmp_path: Path, stage: int) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    rank(**ZERO, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file), ACCELERATE_DEEPSPEED_ZERO_STAGE="9")
    assert (place_of_rank().backend, place_of_rank().zero_stage) == ("deepspeed", stage)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, (False, AMPERE)), ((7, 5), (True, (7, 5))), ((9, 0), (True, (9, 0)))],
)
def test_the_gpu_is_that_of_torch(
    rank: Rank, capability: tuple[int, int] | None, expected: tuple[bool, tuple[int, int]]
) -> None:
    rank(capability)
    assert (place_of_rank().on_gpu, place_of_rank().capability) == expected


@pytest.mark.parametrize("asked", ["fsdp", "deepspeed", "none"])
def test_a_rank_that_was_started_with_another_backend_than_the_configs_is_refused(
    rank: Rank, asked: Any
) -> None:
    config = TrainConfig(trainer="sft", quantization=None, distributed_backend=asked)
    rank(WORLD_SIZE="2")
    with pytest.raises(ConfigError, match=r"distributed_backend: the ranks were started with another"):
        check_requirements(config, place_of_rank())


@pytest.mark.parametrize(
    ("asked", "environ"),
    [
        ("auto", {"WORLD_SIZE": "2"}),
        ("ddp", {"WORLD_SIZE": "2"}),
        ("fsdp", {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}),
        ("deepspeed", ZERO),
        ("fsdp", {}),  # one process: nothing is distributed
    ],
)
def test_a_rank_with_the_backend_of_the_config_is_accepted(
    rank: Rank, asked: Any, environ: dict[str, str]
) -> None:
    rank(**environ)
    config = TrainConfig(trainer="sft", quantization=None, distributed_backend=asked)
    check_requirements(config, place_of_rank())


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_launcher_and_rank_give_the_same_answer(work: Path, rank: Rank, capability: tuple[int, int]) -> None:
    """NVML tells the launcher what torch tells the rank. Below 8.0 both refuse bf16, in the same words."""
    flags = {"trainer": "sft", "model": "model", "mixed_precision": "bf16", "distributed_backend": "ddp"}
    run = load_run(None, flags)
    topology = resolve_topology(run.launch, machine(gpus=2, capability=capability), {})
    rank(capability, WORLD_SIZE="2")
    answers = []
    for check in (
        lambda: resolve_backend(run, topology),
        lambda: check_requirements(run.train, place_of_rank()),
    ):
        try:
            check()
            answers.append("accepted")
        except ConfigError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]
    assert (answers[0] == "accepted") == (capability >= AMPERE)
