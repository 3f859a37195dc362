"""Where this rank computes, from torch and from the environment of `accelerate launch`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainers.config.requirements import AMPERE, Place, cpu_computes_bf16
from trainers.model import fsdp
from trainers.rank.process import world_size


def place_of_rank() -> Place:
    """Return the backend, the number of ranks and the device of this rank."""
    import torch

    on_gpu = torch.cuda.is_available()
    stage = _zero_stage()
    backend = "ddp" if world_size() > 1 else "none"
    return Place(
        backend="fsdp" if fsdp.requested() else "deepspeed" if stage is not None else backend,
        processes=world_size(),
        on_gpu=on_gpu,
        capability=torch.cuda.get_device_capability() if on_gpu else AMPERE,
        cpu_bf16=cpu_computes_bf16(),
        zero_stage=stage,
    )


def _zero_stage() -> int | None:
    """Return the ZeRO stage in the DeepSpeed config of this launch, or None without DeepSpeed."""
    if "ACCELERATE_USE_DEEPSPEED" not in os.environ:
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))  # accelerate's default
    return int(json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]["stage"])
