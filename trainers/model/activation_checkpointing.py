"""Activation checkpointing: what of a layer's forward is kept for its backward, and where.

    none        every activation
    full        the layer's input: the layer runs again in the backward
    selective   its input and what attention came to: all but attention runs again
    offload     as full, and the inputs wait in host memory

The model itself knows the way, whoever switches checkpointing on: transformers does before training, and TRL
after each question to the reference model.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.requirements import reentrancy
from trainers.config.schema import TrainConfig

if TYPE_CHECKING:
    from torch.utils.checkpoint import CheckpointPolicy
    from transformers import PreTrainedModel

# Attention as the dispatcher names it: torch's sdpa on each device, its varlen_attn and its flex_attention.
ATTENTION = frozenset({
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "flex_attention",
})  # fmt: skip
PACKAGE = "flash_attn"  # in the names of flash-attn 2 and 3, and of the hub's builds: _flash_attn2_1f3a::fwd


def checkpoint_layers(model: PreTrainedModel, config: TrainConfig) -> None:
    """Tells a model that is going to be trained how to be. Call it after TrainingArguments exist.

    Raises:
        ConfigError: the model cannot do it.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    mode = config.activation_checkpointing
    if mode == "none":
        return
    _check_support(model, mode)
    way: dict[str, Any] = {"use_reentrant": reentrancy(is_deepspeed_zero3_enabled(), config.peft)[0]}
    if mode == "selective":
        way["context_fn"] = selective_contexts

    def enable(
        self: PreTrainedModel,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        # Not among the TrainingArguments: they must be JSON, and TRL hands their kwargs to torch as they are.
        given = {**(activation_checkpointing_kwargs or {}), **way}
        type(self).activation_checkpointing_enable(self, given, every_n_layers, offload or mode == "offload")

    model.activation_checkpointing_enable = MethodType(enable, model)  # type: ignore[method-assign]  # this model's only


def _check_support(model: PreTrainedModel, mode: str) -> None:
    """Code beside a model may know no checkpointing, or that of transformers before 4.35, which takes no way.

    Raises:
        ConfigError: it cannot do what was asked for.
    """
    name = type(model).__name__
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"activation_checkpointing: {name} does not support it. Use none.")
    old = "value" in inspect.signature(model._set_gradient_checkpointing).parameters
    if old and mode != "full":
        raise ConfigError(f"activation_checkpointing: {name} knows full and none alone. Use one of them.")


def selective_contexts() -> Any:
    """The two contexts of torch's checkpoint: one for the forward, one for what runs again."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name()
    if name in ATTENTION or PACKAGE in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
