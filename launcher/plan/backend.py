"""Resolve distributed_backend: the backend that the user asked for, or (auto) the one that fits."""

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

AUTOTRAIN_ZERO_STAGE = 3  # the stage that AutoTrain used with distributed_backend: deepspeed
MEMORY_SHARE = 0.8  # part of a device's memory that weights, gradients and optimiser state may take


@dataclass(frozen=True)
class Backend:
    """A decision: the backend, the reason, and the static files that define its policy."""

    name: str  # ddp, fsdp, deepspeed or none
    reason: str
    template: Path
    deepspeed_template: Path | None = None


def resolve_backend(run: Run, topology: Topology) -> Backend:
    """Choose the backend, and check that the backend and the machine support the config.

    Raises:
        ConfigError: a combination that is not supported, with the reason and the nearest supported one.
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
            f"{reason}, ZeRO stage {stage}{' (as in AutoTrain)' if run.launch.zero_stage is None else ''}",
            ACCELERATE_CONFIGS / f"deepspeed_zero{stage}{suffix}.yaml",
            DEEPSPEED_CONFIGS / f"zero{stage}{suffix}.json",
        )
    if name == "fsdp":
        sharding = run.launch.sharding
        variant = {"shard_grad_op": "_shard_grad_op", "hybrid_shard": "_hybrid"}.get(sharding or "", "")
        return Backend(name, reason, ACCELERATE_CONFIGS / f"fsdp{variant}.yaml")
    return Backend(name, reason, ACCELERATE_CONFIGS / ("ddp.yaml" if name == "ddp" else "single.yaml"))


def place_of(run: Run, topology: Topology, backend: str, zero_stage: int | None) -> Place:
    """Return the hardware that the run uses, and how the run is distributed over it."""
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
    """Return the backend and the reason for it.

    auto: none with one process; ddp if the model fits on each rank; else fsdp, or deepspeed if fsdp does not
    support the optimiser.
    """
    asked = run.train.distributed_backend
    if asked != "auto":
        return asked, f"asked for ({run.settings.sources['distributed_backend']})"
    if topology.num_processes == 1:
        return "none", "one process"
    size = size_of_model(run.train.model)
    sharded, more = "fsdp", ""
    if re.fullmatch(BITSANDBYTES, run.train.optimizer) and installed("deepspeed"):
        sharded, more = "deepspeed", f"; fsdp does not support {run.train.optimizer}"
    if size is None:
        return (
            sharded,
            f"the size of {run.train.model} is not known before it is downloaded, and {sharded} can hold the "
            f"largest models{more}",
        )
    needed = predict_bytes_per_rank(size, run.train)
    hardware = topology.hardware
    room = min((gpu.memory for gpu in hardware.gpus), default=hardware.memory // topology.local_processes)
    figures = f"predicted {needed / 2**30:.1f} GiB per rank, {room / 2**30:.1f} GiB available"
    if needed <= MEMORY_SHARE * room:
        return "ddp", f"the model fits on each rank ({figures})"
    return sharded, f"the model does not fit on each rank ({figures}){more}"
