"""Which backend a run gets and why, and its templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_model, machine

from launcher.config import Run
from launcher.plan.backend import Backend
from launcher.plan.topology import Hardware, Topology
from trainers.config.errors import ConfigError
from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS

CPU = machine()
BILLION = 10**9
Resolve = Callable[..., tuple[Run, Topology, Backend]]


@pytest.mark.parametrize(
    ("hardware", "parameters", "flags", "name", "reason"),
    [
        (CPU, 1000, {}, "none", "one process"),
        (machine(gpus=1), 100 * BILLION, {}, "none", "one process"),
        (machine(gpus=2), 1000, {}, "ddp", "fits on each rank"),
        (machine(gpus=2), 3 * BILLION, {}, "ddp", "predicted 44.7 GiB per rank, 80.0 GiB available"),
        (machine(gpus=2), 7 * BILLION, {}, "fsdp", "does not fit on each rank"),
        (machine(gpus=2), 7 * BILLION, {"peft": "true"}, "ddp", "fits on each rank"),
        (machine(gpus=2), 70 * BILLION, {"peft": "true", "quantization": "none"}, "fsdp", "does not fit"),
        (machine(gpus=2, gib=16), 3 * BILLION, {}, "fsdp", "does not fit"),
        (
            machine(gpus=2, gib=16),
            3 * BILLION,
            {"optimizer": "adamw_8bit"},
            "deepspeed",
            "fsdp does not support adamw_8bit",
        ),
        (CPU, 1000, {"num_processes": 2}, "ddp", "fits on each rank"),
        (CPU, BILLION, {"num_processes": 2}, "fsdp", "does not fit"),
    ],
)
def test_auto_chooses_the_backend(
    resolve: Resolve,
    work: Path,
    hardware: Hardware,
    parameters: int,
    flags: dict[str, str],
    name: str,
    reason: str,
) -> None:
    fake_model(work / "sized", parameters)
    _, _, chosen = resolve(hardware, model="sized", **flags)
    assert chosen.name == name
    assert reason in chosen.reason


def test_auto_of_unknown_size_is_fsdp(resolve: Resolve) -> None:
    _, _, chosen = resolve(machine(gpus=2), model="org/not-downloaded")
    assert chosen.name == "fsdp"
    assert "not known before it is downloaded" in chosen.reason


def test_auto_finds_a_model_in_the_hub_cache(
    resolve: Resolve, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(work / "hf"))
    fake_model(work / "hf" / "hub" / "models--org--name" / "snapshots" / "abc")
    assert resolve(machine(gpus=2), model="org/name")[2].name == "ddp"


def test_auto_sizes_pickled_weights_by_their_bytes(resolve: Resolve, work: Path) -> None:
    (work / "model" / "model.safetensors").unlink()
    (work / "model" / "pytorch_model.bin").write_bytes(b"\0" * 4096)
    assert resolve(machine(gpus=2))[2].name == "ddp"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_what_was_asked_for_is_taken(resolve: Resolve, name: str) -> None:
    for count in (1, 2):
        _, _, chosen = resolve(num_processes=count, distributed_backend=name)
        assert chosen.name == name
        assert chosen.reason.startswith("asked for (flag --distributed-backend)")


@pytest.mark.parametrize(
    ("flags", "template", "deepspeed"),
    [
        ({"distributed_backend": "none", "num_processes": 1}, "single.yaml", None),
        ({"distributed_backend": "ddp"}, "ddp.yaml", None),
        ({"distributed_backend": "fsdp"}, "fsdp.yaml", None),
        ({"distributed_backend": "fsdp", "sharding": "full_shard"}, "fsdp.yaml", None),
        ({"distributed_backend": "fsdp", "offload": "cpu"}, "fsdp.yaml", None),
        ({"distributed_backend": "fsdp", "sharding": "shard_grad_op"}, "fsdp_shard_grad_op.yaml", None),
        ({"distributed_backend": "fsdp", "sharding": "hybrid_shard", "num_machines": 2,
          "main_process_ip": "h"}, "fsdp_hybrid.yaml", None),
        ({"distributed_backend": "deepspeed"}, "deepspeed_zero3.yaml", "zero3.json"),
        ({"distributed_backend": "deepspeed", "zero_stage": 1}, "deepspeed_zero1.yaml", "zero1.json"),
        ({"distributed_backend": "deepspeed", "zero_stage": 2}, "deepspeed_zero2.yaml", "zero2.json"),
        ({"distributed_backend": "deepspeed", "zero_stage": 3}, "deepspeed_zero3.yaml", "zero3.json"),
        ({"distributed_backend": "deepspeed", "zero_stage": 2, "offload": "cpu"},
         "deepspeed_zero2_offload.yaml", "zero2_offload.json"),
        ({"distributed_backend": "deepspeed", "offload": "cpu"},
         "deepspeed_zero3_offload.yaml", "zero3_offload.json"),
    ],
)  # fmt: skip
def test_each_backend_has_its_templates(
    resolve: Resolve, flags: dict[str, Any], template: str, deepspeed: str | None
) -> None:
    _, _, chosen = resolve(machine(gpus=4), **{"num_processes": 2, **flags})
    assert chosen.template == ACCELERATE_CONFIGS / template
    assert chosen.deepspeed_template == (DEEPSPEED_CONFIGS / deepspeed if deepspeed else None)
    assert chosen.template.is_file()
    assert deepspeed is None or chosen.deepspeed_template.is_file()


def test_deepspeed_without_a_stage_uses_the_stage_of_autotrain(resolve: Resolve) -> None:
    assert (
        "ZeRO stage 3 (as in AutoTrain)"
        in resolve(num_processes=2, distributed_backend="deepspeed")[2].reason
    )
    chosen = resolve(num_processes=2, distributed_backend="deepspeed", zero_stage=3)[2]
    assert "AutoTrain" not in chosen.reason


def test_flags_of_an_auto_run_are_checked_against_the_chosen_backend(resolve: Resolve) -> None:
    with pytest.raises(ConfigError, match=r"launch.sharding: .*fsdp"):
        resolve(num_processes=2, sharding="full_shard")


def test_int8_works_only_with_stages_that_do_not_shard_the_weights(resolve: Resolve) -> None:
    flags = {"num_processes": 2, "distributed_backend": "deepspeed", "peft": True, "quantization": "int8"}
    assert resolve(machine(gpus=2), **flags, zero_stage=2)[2].name == "deepspeed"
    with pytest.raises(ConfigError, match="int8 weights cannot be sharded"):
        resolve(machine(gpus=2), **flags, zero_stage=3)
