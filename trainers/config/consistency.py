"""Rules across the fields of a config: which values contradict each other, and which have no effect."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter

from trainers.config.field_types import TEMPLATE_FILE
from trainers.config.kinds import trainers
from trainers.config.optimizers import OPTIMIZERS, SCHEDULERS, nearest_names
from trainers.config.schema import (
    TrainConfig,
    acts_for,
)

LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules")
HELD_OUT_FIELDS = ("eval_steps", "eval_on_start")
ADAM_FIELDS = ("adam_beta1", "adam_beta2", "adam_epsilon")
NOT_ADAM = ("sgd", "adagrad", "adafactor", "rmsprop")  # how their names in transformers start
NO_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
TEMPLATE_FIELDS = ("chat_template_kwargs", "history", "unrendered", "system_prompt", "roles_to_train")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL 1.16: sigmoid does not read label_smoothing

# Fields that a run does not read: (why, fields, when). If several conditions hold for a field, the last one
# is reported.
CONDITIONS: tuple[tuple[str, tuple[str, ...], Callable[[TrainConfig], bool]], ...] = (
    ("peft is off", LORA_FIELDS, lambda c: not c.peft),
    ("quantization is not int4", ("double_quantization",), lambda c: c.quantization != "int4"),
    ("log is not wandb", ("wandb_project", "wandb_entity"), lambda c: c.log != "wandb"),
    ("log is none", ("run_name",), lambda c: c.log == "none"),
    ("eval_strategy is not steps", ("eval_steps",), lambda c: c.eval_strategy != "steps"),
    ("tokens_per_batch is set", ("batch_size",), lambda c: c.token_budget is not None),
    ("there is no valid_split and no valid_fraction", HELD_OUT_FIELDS, lambda c: not c.validates),
    ("no split is evaluated", ("per_device_eval_batch_size", "eval_packing"),
     lambda c: not (c.validates or c.tests)),
    ("valid_fraction and test_fraction are 0", ("split_seed",),
     lambda c: c.valid_fraction + c.test_fraction == 0),
    ("save_strategy is not steps", ("save_steps",), lambda c: c.save_strategy not in (None, "steps")),
    ("save_strategy is no", ("load_best_model_at_end",), lambda c: c.save_strategy == "no"),
    ("save_strategy is no", ("save_total_limit",),
     lambda c: c.save_strategy == "no" and c.save_minutes is None),
    ("optimizer is not a variant of Adam", ADAM_FIELDS, lambda c: c.optimizer.startswith(NOT_ADAM)),
    ("scheduler has no warm-up", ("warmup_ratio", "warmup_steps"), lambda c: c.scheduler in NO_WARM_UP),
    ("chat_template is null", TEMPLATE_FIELDS, lambda c: c.chat_template is None),
    ("the loss is on all tokens", ("roles_to_train",), lambda c: c.trains_on_all),
    ("chat_template decides how a turn ends", ("add_eos_token",), lambda c: c.chat_template is not None),
    ("push_to_hub is off", ("username",), lambda c: not c.push_to_hub),
    ("model is a folder", ("revision",), lambda c: Path(c.model).is_dir()),
    (f"loss_type is not one of {', '.join(SMOOTHED)}", ("label_smoothing",),
     lambda c: not {*SMOOTHED} & {*c.loss_types}),
    ("loss_type is only sft", ("dpo_beta",), lambda c: c.loss_types == ["sft"]),
    ("max_steps is set", ("epochs",), lambda c: c.max_steps > 0),
    ("warmup_steps is set", ("warmup_ratio",), lambda c: c.warmup_steps is not None),
    ("its kernels and its loader are not used; packing, activation checkpointing and quantised LoRA are "
     "built in", ("unsloth",), lambda c: True),
)  # fmt: skip


def without_effect(config: TrainConfig) -> dict[str, str]:
    """Return the fields that the user set and that have no effect in this run: field -> reason."""
    idle: dict[str, str] = {}
    for name in TrainConfig.model_fields:
        acting = acts_for(name)
        if config.trainer not in acting:
            idle[name] = f"it belongs to {', '.join(acting)}" if acting else "no trainer reads it"
    for why, names, holds in CONDITIONS:
        if holds(config):
            idle |= dict.fromkeys(names, why)
    return {name: why for name, why in idle.items() if name in config.model_fields_set}


def problems(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the rules that the config breaks, each as (field, message)."""
    rows = row_problems(config) if config.mix is None else _template(config)  # mix_reader.py checks sources
    found = [*_lengths(config), *rows, *_packing(config), *_model(config), *_losses(config)]
    for field, names in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        if (name := getattr(config, field)) not in names:
            nearest = ", ".join(nearest_names(name, names))
            found.append((field, f"'{name}' cannot be used. The nearest names: {nearest}."))
    if config.max_steps == 0:
        found.append(("max_steps", "0 would train nothing. Use at least 1, or -1: use epochs."))
    if config.logging_steps == 0:
        found.append(("logging_steps", "0 is no number of steps. Use at least 1, or -1 (docs/config.md)."))
    if config.save_strategy == "steps" and config.save_steps is None:
        found.append(("save_strategy", "steps needs save_steps, for example save_steps: 100."))
    if config.eval_strategy == "steps" and config.eval_steps is None and config.validates:
        found.append(("eval_strategy", "steps needs eval_steps, for example eval_steps: 100."))
    if config.push_to_hub and not (config.username and config.token):
        found.append(("push_to_hub", "username and token are needed, for example username: ${HF_USERNAME}."))
    if config.resume and config.overwrite:
        found.append(("resume", "resume and overwrite contradict each other. Choose one."))
    return found


def _template(config: TrainConfig) -> list[tuple[str, str]]:
    template = config.chat_template
    if template is not None and template.endswith(TEMPLATE_FILE) and not Path(template).is_file():
        return [("chat_template", f"there is no file {template}.")]
    return []


def row_problems(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the rules for `data` that the config breaks, each as (field, message)."""
    found = _template(config)
    for split, fraction in (("valid_split", "valid_fraction"), ("test_split", "test_fraction")):
        if getattr(config, split) is not None and getattr(config, fraction):
            found.append((fraction, f"{split} already names the rows. Keep one of the two."))
    if config.valid_fraction + config.test_fraction >= 1:
        found.append(
            ("valid_fraction", "with test_fraction it leaves no row to train on. Their sum must be below 1.")
        )
    if config.prompt_format is not None:
        if config.prompt_text_column is not None:
            found.append(
                ("prompt_format", "prompt_text_column already names the prompt. Keep one of the two.")
            )
        try:
            named = [name for _, name, _, _ in Formatter().parse(config.prompt_format) if name is not None]
        except ValueError as error:
            found.append(("prompt_format", f"{error}. Write a literal brace twice: {{{{ or }}}}."))
        else:
            if not named or not all(re.fullmatch(r"\w[\w .-]*", name) for name in named):
                found.append(
                    ("prompt_format", "it must name columns in braces, such as '{instruction}\\n{input}'.")
                )
    return found


def _packing(config: TrainConfig) -> list[tuple[str, str]]:
    found = []
    if not config.kind.packs and config.packing not in ("auto", "none"):
        found.append(
            ("packing", "in a masked LM each token sees the full sequence, so documents cannot share one. "
                        "Use packing: none."))  # fmt: skip
    if config.kind.packs and not config.kind.wraps and config.packing == "wrapped":
        found.append(
            ("packing", f"wrapped would cut the answers of {config.trainer}. Use packing: bfd, or none.")
        )
    if config.packed == "none" and config.eval_packing and config.kind.packs:
        found.append(("eval_packing", "packing is none. Set packing: auto, or eval_packing: false."))
    budget = config.token_budget
    if budget is None:
        return found
    if config.packed == "none":
        found.append(("tokens_per_batch", "it counts no padding, so it needs packing. Set packing: auto."))
    if config.kind.rows == "text" and budget < config.sequence_length:
        found.append(
            ("tokens_per_batch", f"{budget} is below block_size ({config.sequence_length}), the longest "
                                 "sequence. Raise it, or lower block_size."))  # fmt: skip
    if config.auto_find_batch_size:
        found.append(
            (
                "auto_find_batch_size",
                "tokens_per_batch already sets the size of a micro-batch. Keep one of the two.",
            )
        )
    return found


def _model(config: TrainConfig) -> list[tuple[str, str]]:
    found = []
    if config.quantization and not config.peft:
        found.append(
            ("quantization", f"{config.quantization} weights cannot be trained directly. "
                             "Set peft: true, or quantization: null."))  # fmt: skip
    if config.trust_remote_code and config.revision is None and not Path(config.model).is_dir():
        found.append(
            ("trust_remote_code", "code from the hub must be pinned. Set revision to the commit that you "
                                  "have read."))  # fmt: skip
    if config.use_flash_attention_2 and config.attention not in ("auto", "flash_attention_2"):
        found.append(("attention", "use_flash_attention_2 selects another one. Keep one of the two."))
    targets = config.lora_targets
    if config.peft and (config.kind.scores or config.kind.reads_head_weight) and targets != "all-linear":
        named = targets if isinstance(targets, list) else [targets or ""]
        if any("lm_head" in name for name in named):
            why = (
                "a reward model has a score output and no lm_head"
                if config.kind.scores
                else "its loss reads the weights of lm_head directly, so an adapter there would never train"
            )
            found.append(("target_modules", f"lm_head: {why}. Remove it, or use all-linear."))
    return found


def _losses(config: TrainConfig) -> list[tuple[str, str]]:
    found = []
    allowed = config.kind.losses
    for name in config.loss_types if allowed else ():
        if name not in allowed:
            found.append(("loss_type", f"'{name}' does not exist. Allowed: {', '.join(allowed)}."))
    if len(config.loss_types) > 1 and not config.kind.sums_losses:
        found.append(("loss_type", f"{config.trainer} takes one loss."))
    if "exo_pair" in config.loss_types and not config.label_smoothing:
        found.append(
            ("label_smoothing", "exo_pair needs a value above 0. The paper (arXiv 2402.00856) uses 0.001.")
        )
    if config.batch_size < smallest_batch(config):
        found.append(
            ("batch_size", "kto estimates a divergence from the samples of a micro-batch and needs at least "
                           "2 of them. Raise batch_size and lower gradient_accumulation."))  # fmt: skip
    return found


def smallest_batch(config: TrainConfig) -> int:
    """Return the smallest batch_size that the loss allows."""
    return 2 if set(config.loss_types) & set(config.kind.batch_losses) else 1


def _lengths(config: TrainConfig) -> list[tuple[str, str]]:
    """Check AutoTrain's five length rules (its documentation, "Task specific parameters")."""
    block, limit = config.sequence_length, config.model_max_length
    found = []
    if isinstance(config.block_size, list) and len(config.block_size) > 1:
        if not config.kind.prompted:
            able = ", ".join(trainers(lambda kind: kind.prompted))
            found.append(
                ("block_size", f"[block, max_prompt, max_completion] is for {able}. With {config.trainer} "
                               "give one number."))  # fmt: skip
        elif len(config.block_size) > 3:
            found.append(
                ("block_size", "a list has at most three entries: [block, max_prompt, max_completion].")
            )
    if block != -1 and block < 1:
        found.append(("block_size", f"{block} is not a length. Allowed: -1 or a number of tokens above 0."))
    rules = (
        ("block_size", block, "model_max_length", limit),
        ("max_prompt_length", config.max_prompt_length, "model_max_length", limit),
        ("max_prompt_length", config.max_prompt_length, "block_size", block),
        ("max_completion_length", config.max_completion_length, "model_max_length", limit),
        ("max_completion_length", config.max_completion_length, "block_size", block),
    )
    for name, value, other, bound in rules:
        # The default of a prompt length does not forbid a short block_size.
        if name != "block_size" and name not in config.model_fields_set:
            continue
        if value is not None and bound > 0 and value > bound:
            found.append((name, f"{value} is above {other} ({bound}). Lower {name} or raise {other}."))
    return found
