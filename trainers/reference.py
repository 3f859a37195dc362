"""A trainer with a reference model: who the reference is, and how long it is kept (dpo, kto)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from trainers import fsdp
from trainers.model import load_model, load_reference, lora_config
from trainers.run import Context

Built = TypeVar("Built", bound=Any)


def build_with_reference(kind: Callable[..., Built], arguments: Any, context: Context) -> Built:
    """Builds the trainer with its policy and reference.

    With precompute_ref_log_probs the rows of the test are asked for too, before training changes the policy,
    and the reference is let go.
    """
    config = context.config
    early = config.precompute_ref_log_probs
    # Before training, the policy is its own reference; under FSDP it is not sharded yet, so TRL needs one.
    needed = config.model_ref is not None or not early or fsdp.asked_for()
    asked = {part: prepared.dataset for part, prepared in context.data.items() if part != "train"}
    model = load_model(config, context.tokenizer)
    trainer = kind(
        model=model,
        ref_model=load_reference(config, context.tokenizer) if needed else None,
        args=arguments,
        train_dataset=context.rows("train"),
        eval_dataset=(asked or None) if early else context.rows("valid"),
        processing_class=context.tokenizer,
        peft_config=lora_config(config, context.new_tokens, model),
    )
    if early:
        trainer.ref_model = None
        for part, answered in (trainer.eval_dataset or {}).items():
            context.data[part].dataset = answered
        trainer.eval_dataset = context.rows("valid")
    return trainer
