"""Which backend a run gets and why, its static files, and the files and the command generated from them.

The generated files must equal those in golden/, next to this file. After an intended change:
PHALANX_GOLDEN=write pytest tests/unit/launcher/plan/test_backend.py
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import fake_model, machine

from launcher.config import LaunchConfig, Run, load_run
from launcher.plan.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.plan.backend import Backend, resolve_backend
from launcher.plan.command import build_command, build_environment
from launcher.plan.memory import predict_bytes_per_rank
from launcher.plan.topology import Hardware, Topology, resolve_topology
from trainers.config.errors import ConfigError
from trainers.config.packages import installed
from trainers.config.requirements import RULES
from trainers.config.schema import TrainConfig
from trainers.rank.protocol import AttemptFiles
from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS, SHIPPED

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("PHALANX_GOLDEN") == "write"
HERE = Path("/runs/mine/launch/attempt-1")
CPU = machine()
BILLION = 10**9


@pytest.fixture
def resolve(work: Path, packages: object) -> Callable[..., tuple[Run, Topology, Backend]]:
    """Return resolve(): `resolve(hardware, zero_stage=2, ...)` is a run, its topology and its backend."""

    def decide(hardware: Hardware = CPU, **flags: object) -> tuple[Run, Topology, Backend]:
        given = {"trainer": "sft", "model": "model", "main_process_port": "23456", **flags}
        run = load_run(None, {name: str(value) for name, value in given.items()})
        topology = resolve_topology(run.launch, hardware, {})
        return run, topology, resolve_backend(run, topology)

    return decide


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


def test_every_rule_names_a_key_and_a_fix() -> None:
    for rule in RULES:
        section, _, name = rule.key.rpartition(".")
        assert name in {"": TrainConfig, "launch": LaunchConfig}[section].model_fields
        assert rule.reason.endswith(".")
        assert rule.fix.endswith(".")


def test_installed() -> None:
    assert installed("pyyaml")
    assert not installed("no-such-distribution")


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


def same_as_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if WRITE:
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs"


@pytest.mark.parametrize("name", GENERATED)
def test_generated_files(resolve: Resolve, name: str) -> None:
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


@pytest.mark.parametrize(
    ("name", "hardware", "flags"),
    [
        ("command_one_cpu", CPU, {}),
        ("command_two_cpu_ranks", CPU, GENERATED["ddp"]),
        ("command_four_gpus", machine(gpus=4), GENERATED["fsdp"]),
        ("command_two_machines", machine(gpus=4), GENERATED["ddp_two_machines"]),
    ],
)
def test_command(resolve: Resolve, name: str, hardware: Hardware, flags: dict[str, Any]) -> None:
    argv = build_command(*resolve(hardware, **flags), AttemptFiles(HERE))
    assert argv[0] == sys.executable
    same_as_golden(f"{name}.txt", "\n".join(["python", *argv[1:]]) + "\n")


def test_with_more_ranks_than_cores_each_rank_gets_one_thread(resolve: Resolve) -> None:
    run, topology, chosen = resolve(num_processes=16, distributed_backend="ddp")
    argv = build_command(run, topology, chosen, AttemptFiles(HERE))
    assert argv[argv.index("--num_cpu_threads_per_process") + 1] == "1"


def test_environment(resolve: Resolve) -> None:
    run, topology, _ = resolve(token="hf_secret")
    base = {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    made = build_environment(run, topology, base, HERE, live_terminal=False)
    ours = {
        "PHALANX_LOG_DIR": str(HERE),
        "PHALANX_LIVE": "0",
        "OMP_NUM_THREADS": "8",
        "HF_TOKEN": "hf_secret",
    }
    assert made == {**base, **ours, "NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}
    assert build_environment(run, topology, base, HERE, live_terminal=True)["PHALANX_LIVE"] == "1"
    assert base == {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    assert "HF_TOKEN" not in build_environment(resolve()[0], topology, base, HERE, live_terminal=False)


def test_the_interface_between_machines(resolve: Resolve) -> None:
    """It is the interface to machine 0. What the site has set stays."""
    run, topology, _ = resolve(num_machines=2, main_process_ip="127.0.0.1", num_processes=2)
    made = build_environment(run, topology, {"NCCL_SOCKET_IFNAME": "ib0"}, HERE, live_terminal=False)
    assert (made["NCCL_SOCKET_IFNAME"], made["GLOO_SOCKET_IFNAME"]) == ("ib0", "lo")
    made = build_environment(run, topology, {}, HERE, live_terminal=False)
    assert made["NCCL_SOCKET_IFNAME"] == "=lo", "not every interface whose name begins with lo"
    run, topology, _ = resolve(num_processes=2)
    made = build_environment(run, topology, {}, HERE, live_terminal=False)
    assert made["GLOO_SOCKET_IFNAME"] == "lo", "the ranks of one machine use loopback"


def test_the_users_number_of_threads_stays(resolve: Resolve) -> None:
    run, topology, _ = resolve(num_processes=4)
    threads = [
        build_environment(run, topology, base, HERE, live_terminal=False)["OMP_NUM_THREADS"]
        for base in ({}, {"OMP_NUM_THREADS": "5"})
    ]
    assert threads == ["2", "5"]


@pytest.mark.parametrize(("visible", "expected"), [(None, "0"), ("2,3", "2")])
def test_one_process_sees_one_gpu(resolve: Resolve, visible: str | None, expected: str) -> None:
    run, topology, _ = resolve(machine(gpus=2), num_processes=1)
    base = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert (
        build_environment(run, topology, base, HERE, live_terminal=False)["CUDA_VISIBLE_DEVICES"] == expected
    )
    run, topology, _ = resolve(machine(gpus=2), num_processes=2)
    assert (
        build_environment(run, topology, base, HERE, live_terminal=False).get("CUDA_VISIBLE_DEVICES")
        == visible
    )


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ({"trainer": "sft"}, 1),
        ({"trainer": "dpo"}, 2),
        ({"trainer": "kto"}, 2),
        ({"trainer": "orpo"}, 1),
        ({"trainer": "dpo", "precompute_ref_log_probs": True}, 1),
        ({"trainer": "dpo", "peft": True, "quantization": None}, 1),  # the base model with its adapter off
        ({"trainer": "dpo", "peft": True, "quantization": None, "model_ref": "other"}, 2),
    ],
)
def test_a_reference_model_counts_as_memory(values: dict[str, Any], weights: int) -> None:
    single = predict_bytes_per_rank(1000, TrainConfig(**values | {"trainer": "sft", "model_ref": None}))
    assert predict_bytes_per_rank(1000, TrainConfig(**values)) - single == (weights - 1) * 4 * 1000


def test_int8_works_only_with_stages_that_do_not_shard_the_weights(resolve: Resolve) -> None:
    flags = {"num_processes": 2, "distributed_backend": "deepspeed", "peft": True, "quantization": "int8"}
    assert resolve(machine(gpus=2), **flags, zero_stage=2)[2].name == "deepspeed"
    with pytest.raises(ConfigError, match="int8 weights cannot be sharded"):
        resolve(machine(gpus=2), **flags, zero_stage=3)
