"""Activation checkpointing: on unless disable_gradient_checkpointing.

The trainer's switch is the only one.
"""

from __future__ import annotations

from typing import Any

from trainers.config import TrainConfig


def checkpointing_arguments(config: TrainConfig) -> dict[str, Any]:
    """The TrainingArguments that switch it.

    Non-reentrant on every backend: reentrant checkpointing with LoRA under DDP marks a parameter ready
    twice. TRL itself turns to reentrant for ZeRO-3 with peft, which needs it (trl#2514).
    """
    if config.disable_gradient_checkpointing:
        return {"activation_checkpointing": False}
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
