"""Resolves distributed_backend: the one that was asked for, or the one that fits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launcher.config import Run
from launcher.plan.memory import predict_bytes_per_rank, size_of_model
from launcher.plan.topology import Topology
from trainers.config.packages import installed
from trainers.config.requirements import AMPERE, BITSANDBYTES, Place, check_requirements
from trainers.storage.shipped import ACCELERATE_CONFIGS, DEEPSPEED_CONFIGS

AUTOTRAIN_ZERO_STAGE = 3  # what AutoTrain's distributed_backend: deepspeed ran
MEMORY_SHARE = 0.8  # part of a device's memory that the weights, gradients and optimiser may fill


@dataclass(frozen=True)
class Backend:
    """The decision: which backend, why, and the static files that own its policy."""

    name: str  # ddp, fsdp, deepspeed or none
    reason: str
    template: Path
    deepspeed_template: Path | None = None


def resolve_backend(run: Run, topology: Topology) -> Backend:
    """Chooses the backend, and checks that the config goes with it and with the machine.

    Raises:
        ConfigError: a pair that does not go together, with the reason and the nearest right one.
    """
    name, reason = _choose(run, topology)
    stage = run.launch.zero_stage
    if name == "deepspeed" and stage is None:
        stage = AUTOTRAIN_ZERO_STAGE
    check_requirements(run.train, place_of(run, topology, name, stage))
    if name == "deepspeed":
        suffix = "_offload" if run.launch.offload == "cpu" else ""
        return Backend(
            name,
            f"{reason}, ZeRO stage {stage}{' (as AutoTrain)' if run.launch.zero_stage is None else ''}",
            ACCELERATE_CONFIGS / f"deepspeed_zero{stage}{suffix}.yaml",
            DEEPSPEED_CONFIGS / f"zero{stage}{suffix}.json",
        )
    if name == "fsdp":
        sharding = run.launch.sharding
        variant = {"shard_grad_op": "_shard_grad_op", "hybrid_shard": "_hybrid"}.get(sharding or "", "")
        return Backend(name, reason, ACCELERATE_CONFIGS / f"fsdp{variant}.yaml")
    return Backend(name, reason, ACCELERATE_CONFIGS / ("ddp.yaml" if name == "ddp" else "single.yaml"))


def place_of(run: Run, topology: Topology, backend: str, zero_stage: int | None) -> Place:
    """Return where the run is going to compute."""
    hardware = topology.hardware
    return Place(
        backend=backend,
        processes=topology.num_processes,
        on_gpu=topology.on_gpu,
        capability=min((gpu.capability for gpu in hardware.gpus), default=AMPERE),
        cpu_bf16=hardware.cpu_bf16,
        zero_stage=zero_stage,
        machines=topology.num_machines,
        sharding=run.launch.sharding,
        offload=run.launch.offload,
    )


def _choose(run: Run, topology: Topology) -> tuple[str, str]:
    """auto: one process -> none; the model fits on each rank -> ddp; else fsdp, or as the optimiser wants."""
    asked = run.train.distributed_backend
    if asked != "auto":
        return asked, f"asked for ({run.settings.sources['distributed_backend']})"
    if topology.num_processes == 1:
        return "none", "one process"
    size = size_of_model(run.train.model)
    sharded, more = "fsdp", ""
    if re.fullmatch(BITSANDBYTES, run.train.optimizer) and installed("deepspeed"):
        sharded, more = "deepspeed", f"; {run.train.optimizer} does not go with fsdp"
    if size is None:
        return (
            sharded,
            f"the size of {run.train.model} is not known before it is downloaded, and {sharded} holds the "
            f"largest{more}",
        )
    needed = predict_bytes_per_rank(size, run.train)
    hardware = topology.hardware
    room = min((gpu.memory for gpu in hardware.gpus), default=hardware.memory // topology.local_processes)
    figures = f"predicted {needed / 2**30:.1f} GiB a rank, {room / 2**30:.1f} GiB there"
    if needed <= MEMORY_SHARE * room:
        return "ddp", f"the model fits on each rank ({figures})"
    return sharded, f"the model does not fit on each rank ({figures}){more}"
