"""What FSDP2 needs in addition to accelerate: ranks without a GPU, and models with tied weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def requested() -> bool:
    """Return whether the launcher, or the accelerate config of ranks started by hand, asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def enable_on_cpu(mixed_precision: str) -> None:
    """Set accelerate's state to FSDP on CPU ranks too. torch's fully_shard works there, over gloo.

    accelerate 1.15 uses FSDP only on accelerators (state.py), and leaves CPU ranks on DDP, each with the full
    model. Its state is shared and created once, so this function creates it before the Trainer does. Call it
    after TrainingArguments exist, because they set up the process group.
    """
    import torch

    if not requested() or torch.cuda.is_available():
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


def choose_wrapped_modules(model: PreTrainedModel) -> None:
    """Choose the classes of modules that are sharded by themselves, of those in `_no_split_modules`.

    accelerate wraps each class there, and refuses a class that the model does not have, such as the text half
    of a vision tower. Modules with a tied weight are left to the root module, which contains both owners of
    the weight: BERT names its embeddings there, and its decoder shares their weight. A weight that is sharded
    in one module cannot be sharded again in another.

    Raises:
        ConfigError: two modules share the output bias as well, as in BERT and the first models after it.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    holders = {
        type(module).__name__
        for path, module in model.named_modules()
        if path and any(name.startswith(f"{path}.") for name in tied)
    }
    known = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = [name for name in model._no_split_modules or [] if name in known - holders]
    output = model.get_output_embeddings()
    tied_bias = getattr(output, "bias", None)
    owners = [m for m in model.modules() if any(p is tied_bias for p in m.parameters(recurse=False))]
    if tied_bias is not None and len(owners) > 1:
        raise ConfigError(
            f"distributed_backend: fsdp cannot shard {type(model).__name__}, because two modules share its "
            "output bias (accelerate puts them into two groups). Use ddp or deepspeed."
        )


def check_buffers(model: PreTrainedModel) -> None:
    """Check that a model has no buffer in its files. accelerate 1.15 takes all that is there for sharded.

    This concerns models that only rank 0 reads (cpu_ram_efficient_loading), except int4 ones.

    Raises:
        ConfigError: it has one.
    """
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    if not efficient or getattr(model, "is_loaded_in_4bit", False):
        return
    stored = model.state_dict().keys()
    if name := next((name for name, _ in model.named_buffers() if name in stored), None):
        raise ConfigError(
            f"distributed_backend: fsdp cannot shard {type(model).__name__}, because accelerate does not "
            f"support a buffer in the model's files ({name}). Use ddp or deepspeed."
        )


def full_tensor(tensor: Any) -> Any:
    """Return the full parameter from its shards, for a read outside of its module's forward.

    Each rank computes a gradient from its own micro-batch. The gradients are averaged over the ranks, as in
    FSDP.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    ranks = tensor.device_mesh.size()
    full = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / ranks)
    return full
