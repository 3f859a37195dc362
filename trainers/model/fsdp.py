"""What FSDP2 needs beyond accelerate's own: ranks without a GPU, and models with tied weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def asked_for() -> bool:
    """Whether the launcher, or the accelerate config of a run by hand, asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def enable_on_cpu(mixed_precision: str) -> None:
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
    state = AcceleratorState(
        mixed_precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
    )
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(mixed_precision)


def keep_tied_together(model: PreTrainedModel) -> None:
    """Leaves modules that hold a tied weight to the root, where both its owners are.

    accelerate wraps each class of `_no_split_modules`; BERT's names its embeddings, whose weight the decoder
    shares, and a weight that was sharded in one place cannot be sharded again in another.

    Raises:
        ConfigError: BERT and its first followers, which share the bias of their output as well.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    holders = {
        type(module).__name__
        for path, module in model.named_modules()
        if path and any(name.startswith(f"{path}.") for name in tied)
    }
    model._no_split_modules = [name for name in model._no_split_modules or [] if name not in holders]
    output = model.get_output_embeddings()
    tied_bias = getattr(output, "bias", None)
    owners = [m for m in model.modules() if any(p is tied_bias for p in m.parameters(recurse=False))]
    if tied_bias is not None and len(owners) > 1:
        raise ConfigError(
            f"distributed_backend: fsdp cannot shard {type(model).__name__}, whose output bias is of two "
            "modules (accelerate puts them into two groups). Use ddp or deepspeed."
        )


def whole(tensor: Any) -> Any:
    """A parameter put together from its shards, where it is read outside of its module's forward.

    Each rank has the gradient of its own rows, so they are averaged over the ranks, as FSDP does.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    ranks = tensor.device_mesh.size()
    full = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / ranks)
    return full
