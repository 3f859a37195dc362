"""Activation checkpointing: what a layer's forward keeps for its backward, and where.

    none        all activations
    full        only the input of the layer: the layer runs again in the backward
    selective   the input and the output of attention: everything but attention runs again
    offload     as full, but the inputs are kept in host memory

The options are attached to the model, because several callers switch checkpointing on: transformers before
training, and TRL each time after it used the reference model.
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

# The dispatcher's names of attention: torch's sdpa on each device, its varlen_attn and its flex_attention.
ATTENTION = frozenset({
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "flex_attention",
})  # fmt: skip
PACKAGE = "flash_attn"  # part of the names in flash-attn 2 and 3, and in hub builds: _flash_attn2_1f3a::fwd


def checkpoint_layers(model: PreTrainedModel, config: TrainConfig) -> None:
    """Set how a model checkpoints its activations in training. Call it after TrainingArguments exist.

    Raises:
        ConfigError: the model does not support what the config asks for.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    mode = config.activation_checkpointing
    if mode == "none":
        return
    _check_support(model, mode)
    options: dict[str, Any] = {"use_reentrant": reentrancy(is_deepspeed_zero3_enabled(), config.peft)[0]}
    if mode == "selective":
        options["context_fn"] = selective_contexts

    def enable(
        self: PreTrainedModel,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        # Not in TrainingArguments: those must be JSON, and TRL passes their kwargs to torch unchanged.
        given = {**(activation_checkpointing_kwargs or {}), **options}
        type(self).activation_checkpointing_enable(self, given, every_n_layers, offload or mode == "offload")

    model.activation_checkpointing_enable = MethodType(enable, model)  # type: ignore[method-assign]  # only of this model


def _check_support(model: PreTrainedModel, mode: str) -> None:
    """Check that the model supports this mode.

    Remote code may not support checkpointing, or only as transformers before 4.35 did, without options.

    Raises:
        ConfigError: the model does not support it.
    """
    name = type(model).__name__
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"activation_checkpointing: {name} does not support it. Use none.")
    old = "value" in inspect.signature(model._set_gradient_checkpointing).parameters
    if old and mode != "full":
        raise ConfigError(f"activation_checkpointing: {name} supports only full and none. Use one of them.")


def selective_contexts() -> Any:
    """Return the two contexts for torch's checkpoint: one for the forward, one for the recomputation."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name()
    if name in ATTENTION or PACKAGE in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
