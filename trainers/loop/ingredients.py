"""The arguments of a trainer: model, samples, tokenizer, LoRA settings, and a reference model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from trainers.config.schema import TrainConfig
from trainers.data.mixing import spans
from trainers.loop.context import Context
from trainers.model import fsdp
from trainers.model.cpu_head import replace_trls_head
from trainers.model.load import load_model, load_reference
from trainers.model.lora import lora_config
from trainers.model.reach import freeze_unreached
from trainers.model.source import model_folder
from trainers.model.token_mean import divide_by_all_tokens
from trainers.rank.agreement import digest
from trainers.storage.base_weights import weights_key
from trainers.storage.resumed import Inputs

Built = TypeVar("Built", bound=Any)


def ingredients(context: Context) -> dict[str, Any]:
    """Return the arguments that all trainers take.

    Call it after TrainingArguments exist, so that ZeRO-3 and FSDP can shard while loading.
    """
    replace_trls_head()
    model = load_model(context.config, context.tokenizer)
    frozen = freeze_unreached(model)
    divide_by_all_tokens(model)
    return {
        "config": context.config,
        "inputs": Inputs(rows_key(context), weights_keys(context.config, base_model=context.config.model)),
        "model": model,
        "train_dataset": context.rows("train"),
        "eval_dataset": context.rows("valid"),
        "spans": {part: spans(prepared) for part, prepared in context.data.items() if part != "train"},
        "processing_class": context.tokenizer,
        "peft_config": lora_config(context.config, context.new_tokens, model, frozen),
    }


def rows_key(context: Context) -> str:
    """Return the key of the rows of all parts."""
    return digest({part: prepared.key for part, prepared in context.data.items()})


def weights_keys(config: TrainConfig, **models: str) -> dict[str, str]:
    """Return the keys of the weights of these models, which are loaded already."""
    return {name: weights_key(model_folder(model, config)) for name, model in models.items()}


def build_with_reference(kind: Callable[..., Built], arguments: Any, context: Context) -> Built:
    """Build a trainer with a policy and a reference.

    With precompute_ref_log_probs, the reference also scores the test samples here, before training changes
    the policy. Then its memory is freed.
    """
    config = context.config
    early = config.precompute_ref_log_probs
    # Before training, the policy is its own reference. Under FSDP it is not sharded yet: TRL needs another.
    needed = config.model_ref is not None or not early or fsdp.requested()
    parts = ingredients(context)
    if early:
        held_out = {part: prepared.dataset for part, prepared in context.data.items() if part != "train"}
        parts["eval_dataset"] = held_out or None
    reference = load_reference(config, context.tokenizer) if needed else None
    if config.model_ref is not None:
        keys = parts["inputs"].weights | weights_keys(config, model_ref=config.model_ref)
        parts["inputs"] = replace(parts["inputs"], weights=keys)
    trainer = kind(args=arguments, ref_model=reference, **parts)
    if early:
        trainer.ref_model = None
        for part, answered in (trainer.eval_dataset or {}).items():
            context.data[part].dataset = answered
        trainer.eval_dataset = context.rows("valid")
    return trainer
