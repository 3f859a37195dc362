"""What a resume may change: each field of the config has one rule. docs/checkpoints.md shows them as a table.

fixed      It decides what the weights are, or what a metric means. Another value is refused: the state of
           the optimiser would overwrite it, or the run would be a mixture of two.
training   Training uses the new value from this step on. After the last step it has no effect, so run.json
           and the model card keep the value of the training.
used       The new value is used from now on, also after the last step.
compared   What it names is compared, not the name: the rows, the weights. They may be in another place. The
           path of a source of a mix is compared like this too; all else of a mix is fixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from trainers.config.schema import TrainConfig

Rule = Literal["fixed", "training", "used", "compared"]

FIXED = (
    "trainer", "seed", "data_seed", "mix",
    "train_split", "valid_split", "test_split", "valid_fraction", "test_fraction", "split_seed",
    "chat_template", "chat_template_kwargs", "history", "unrendered", "system_prompt", "text_column",
    "prompt_text_column", "prompt_format", "rejected_text_column",
    "label_column", "train_on", "roles_to_train", "block_size", "model_max_length", "max_prompt_length",
    "max_completion_length", "packing", "add_eos_token", "padding", "tokens_per_batch",
    "lr", "optimizer", "scheduler", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "mixed_precision",
    "peft", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora",
    "quantization", "double_quantization",
    "loss_type", "label_smoothing", "dpo_beta", "orpo_beta", "kto_beta", "desirable_weight",
    "undesirable_weight", "center_rewards_coefficient", "mlm_probability",
)  # fmt: skip
TRAINING = (
    "epochs", "max_steps", "batch_size", "gradient_accumulation", "auto_find_batch_size",
    "activation_checkpointing", "attention", "use_flash_attention_2", "torch_compile", "use_kernels",
    "dataloader_num_workers", "precompute_ref_log_probs", "distributed_backend",
    "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "eval_packing",
    "save_strategy", "save_steps", "save_minutes", "save_total_limit", "load_best_model_at_end",
    "logging_steps",
)  # fmt: skip
USED = (
    "project_name", "resume", "overwrite", "trust_remote_code", "merge_adapter", "log", "run_name",
    "wandb_project", "wandb_entity", "push_to_hub", "username", "token", "unsloth",
)  # fmt: skip
COMPARED = ("model", "revision", "model_ref", "data_path")

RULES: dict[str, Rule] = {
    **dict.fromkeys(FIXED, "fixed"),
    **dict.fromkeys(TRAINING, "training"),
    **dict.fromkeys(USED, "used"),
    **dict.fromkeys(COMPARED, "compared"),
}
ANEW = "or start anew with --overwrite or another project_name."


def why_refused(place: str, then: Mapping[str, Any], now: TrainConfig) -> str | None:
    """Return why a run with config `now` cannot resume from `place`, or None if it can.

    `then` is the config that `place` records. A field that a later version added is not in it, and is not
    compared.
    """
    old, new = _fixed(then), _fixed(now.public())
    differing = [n for n in {**new, **old} if _recorded(n, then) and old.get(n) != new.get(n)]
    if "mix" in differing:  # there are other sources
        differing = [name for name in differing if not name.startswith("mix.")]
    if not differing:
        return None
    found = "; ".join(
        f"{name}: it is {_text(new.get(name))}, but {_text(old.get(name))} in the training of {place}"
        for name in differing
    )
    what, former = ("this value", "one") if len(differing) == 1 else ("these values", "ones")
    return f"{found}. A resume cannot change {what}. Give the old {former}, {ANEW}"


def _fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed values. A mix becomes the names of its sources, and the keys of each but its path."""
    found = {name: values[name] for name in FIXED if name in values}
    sources = found.get("mix")
    if not isinstance(sources, list):
        return found
    found["mix"] = ", ".join(source["name"] for source in sources)
    for source in sources:
        for key, value in source.items():
            if key not in ("name", "path"):
                found[f"mix.{source['name']}.{key}"] = value
    return found


def _recorded(name: str, then: Mapping[str, Any]) -> bool:
    """Return whether a config records a field: an earlier version may not have had it."""
    return name.partition(".")[0] in then


def why_too_short(place: str, step: int, now: TrainConfig, last_step: int) -> str | None:
    """Return why a run that ends at `last_step` cannot resume from `step`, or None if it can."""
    if last_step >= step:
        return None
    field = "max_steps" if now.max_steps > 0 else "epochs"
    return (
        f"{field}: the run would end at step {last_step}, but {place} is trained to step {step}. Give a "
        f"larger value, resume an earlier checkpoint (resume: PATH), {ANEW}"
    )


def same_length(then: Mapping[str, Any], now: TrainConfig) -> bool:
    """Return whether both configs ask for the same length of the training."""
    return (then["max_steps"], then["epochs"]) == (now.max_steps, now.epochs)


def settled(merged: bool) -> tuple[str, ...]:
    """Return the fields that have no effect any more once the run is trained, or also `merged`."""
    return (*TRAINING, "merge_adapter") if merged else TRAINING


def as_trained(then: Mapping[str, Any], now: TrainConfig, merged: bool) -> tuple[TrainConfig, str]:
    """Return the config that describes a finished run, and a note on what has no effect any more, or "".

    `then` is the config that it was trained with.
    """
    values = now.public()
    kept = {name: then[name] for name in settled(merged) if name in then and then[name] != values[name]}
    given = [name for name in kept if name in now.model_fields_set]
    verb = "has" if len(given) == 1 else "have"
    why = f"{verb} no effect, since the run is trained; run.json and the model card keep the old values"
    return now.model_copy(update=kept), f"{', '.join(given)}: {why}." if given else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
