"""The static files of each backend, and the files that are generated from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import machine

from launcher.config import Run
from launcher.plan.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.plan.backend import Backend
from launcher.plan.topology import Topology
from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS, SHIPPED

Resolve = Callable[..., tuple[Run, Topology, Backend]]
HERE = Path("/runs/mine/launch/attempt-1")


@pytest.mark.parametrize("path", sorted(ACCELERATE_CONFIGS.glob("*")), ids=lambda path: path.name)
def test_shipped_accelerate_configs(path: Path) -> None:
    text = path.read_text()
    config = yaml.safe_load(text)
    assert path.suffix == ".yaml"
    assert f"--config_file accelerate_configs/{path.name}" in text, "the command that runs it by hand"
    kind = path.stem.split("_")[0]
    assert (
        config["distributed_type"]
        == {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}[kind]
    )
    assert config.get("mixed_precision", "no") == "no", "only the trainer's mixed_precision may set it"
    if kind == "deepspeed":
        pointer = config["deepspeed_config"]["deepspeed_config_file"]
        assert (ACCELERATE_CONFIGS.parent / pointer).is_file()
        assert path.stem.removeprefix("deepspeed_") == Path(pointer).stem
    if kind == "fsdp":
        assert config["fsdp_config"]["fsdp_version"] == 2
        assert config["fsdp_config"]["fsdp_activation_checkpointing"] is False


@pytest.mark.parametrize("path", sorted(DEEPSPEED_CONFIGS.glob("*")), ids=lambda path: path.name)
def test_shipped_deepspeed_configs(path: Path) -> None:
    config = json.loads(path.read_text())
    policy = config["zero_optimization"]
    assert path.stem.startswith(f"zero{policy['stage']}")
    assert ("offload_optimizer" in policy) == path.stem.endswith("_offload")
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[name] == "auto"
    assert (ACCELERATE_CONFIGS / f"deepspeed_{path.stem}.yaml").is_file()


def test_no_sharding_policy_in_python() -> None:
    """The template has everything except the topology, the offload switch and the path of deepspeed.json."""
    words = re.compile(r"fsdp_(?!config|offload_params)\w+|stage3_\w+|reduce_bucket\w*|overlap_comm")
    for path in (SHIPPED / "launcher").rglob("*.py"):
        assert not words.findall(path.read_text()), path


TWO_MACHINES = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "node07"}
FSDP = {"num_processes": 4, "distributed_backend": "fsdp"}
ZERO = {"num_processes": 4, "distributed_backend": "deepspeed"}
GENERATED: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {"num_processes": 2, "distributed_backend": "ddp"},
    "ddp_two_machines": {"num_processes": 8, "distributed_backend": "ddp", **TWO_MACHINES},
    "fsdp": FSDP,
    "fsdp_offload": {**FSDP, "offload": "cpu"},
    "fsdp_shard_grad_op": {**FSDP, "sharding": "shard_grad_op"},
    "fsdp_hybrid": {**FSDP, "num_processes": 8, "sharding": "hybrid_shard", **TWO_MACHINES},
    "zero1": {**ZERO, "zero_stage": 1},
    "zero2": {**ZERO, "zero_stage": 2},
    "zero3": {**ZERO, "zero_stage": 3},
    "zero2_offload": {**ZERO, "zero_stage": 2, "offload": "cpu"},
    "zero3_offload": {**ZERO, "zero_stage": 3, "offload": "cpu"},
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_files(resolve: Resolve, same_as_golden: Callable[[str, str], None], name: str) -> None:
    run, topology, chosen = resolve(machine(gpus=1 if name == "single" else 4), **GENERATED[name])
    accelerate = build_accelerate_config(chosen, topology, run.launch, HERE / "deepspeed.json")
    same_as_golden(f"{name}.yaml", yaml.safe_dump(accelerate, sort_keys=False))
    deepspeed = build_deepspeed_config(chosen)
    assert (deepspeed is not None) == name.startswith("zero")
    if deepspeed is not None:
        assert deepspeed == json.loads((DEEPSPEED_CONFIGS / f"{name}.json").read_text())
        assert accelerate["deepspeed_config"]["deepspeed_config_file"] == str(HERE / "deepspeed.json")


def test_hybrid_sizes_multiply_to_the_ranks(resolve: Resolve) -> None:
    run, topology, chosen = resolve(machine(gpus=4), **GENERATED["fsdp_hybrid"])
    sizes = build_accelerate_config(chosen, topology, run.launch, None)["parallelism_config"]
    assert sizes["parallelism_config_dp_replicate_size"] * sizes["parallelism_config_dp_shard_size"] == 8


def test_a_relative_path_of_the_deepspeed_config_is_a_bug(resolve: Resolve) -> None:
    run, topology, chosen = resolve(num_processes=2, distributed_backend="deepspeed")
    with pytest.raises(AssertionError):
        build_accelerate_config(chosen, topology, run.launch, Path("deepspeed.json"))
