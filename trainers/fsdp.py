"""FSDP on ranks without a GPU: accelerate would run them as plain DDP, and say nothing."""

from __future__ import annotations

import os


def asked_for() -> bool:
    """Whether the launcher, or the accelerate config of a run by hand, asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def enable_on_cpu() -> None:
    """Makes accelerate's state say FSDP on CPU ranks too; torch's fully_shard works there, over gloo.

    accelerate 1.15 turns to FSDP for accelerators only (state.py), and leaves CPU ranks on DDP, each with
    the whole model. Its state is shared and made once, so it is made here, before the Trainer makes it.
    Call it after TrainingArguments exist, which set up the process group.
    """
    import torch

    if not asked_for() or torch.cuda.is_available():
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin

    PartialState().distributed_type = DistributedType.FSDP
    state = AcceleratorState(cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
