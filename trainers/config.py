"""The schema of model, data, optimisation and each trainer: AutoTrain Advanced's LLM parameters, and ours.

Pydantic only: the launcher imports this module to check a run without importing torch. One schema gives the
errors of a config file, the command-line flags, the JSON schema and the table in docs/config.md.
Defaults are AutoTrain's, so that its configs mean here what they meant there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TRAINERS = ("default", "sft", "reward", "dpo", "orpo")  # what the schema knows, AutoTrain's five
AVAILABLE_TRAINERS = ("sft",)  # what this version can run
BLOCK_SIZE_LIMIT = 1024  # what AutoTrain makes of block_size: -1

# Names that mean the same thing elsewhere (Hugging Face's TrainingArguments, TRL) -> our field.
ALIASES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "output_dir": "project_name",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "lr",
    "optim": "optimizer",
    "lr_scheduler_type": "scheduler",
    "evaluation_strategy": "eval_strategy",
    "report_to": "log",
    "max_seq_length": "block_size",
    "max_length": "block_size",
    "resume_from_checkpoint": "resume",
    "dataset_text_field": "text_column",
}
# Names that say the opposite of our field: their value is negated.
NEGATED = {"gradient_checkpointing": "disable_gradient_checkpointing"}
# Exit codes (docs/exit-codes.md). A run stopped by a signal ends with 128 + its number.
RUN_FAILED = 1
USAGE_ERROR = 2
LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")
PREFERENCE_FIELDS = (
    "model_ref", "dpo_beta", "max_prompt_length", "max_completion_length", "rejected_text_column",
)  # fmt: skip
SECRET_FIELDS = frozenset({"token"})


class ConfigError(ValueError):
    """A mistake that the user can mend: what is wrong, where, what is allowed. Exit code 2, no traceback."""


def _none_word(value: Any) -> Any:
    """`none`, `null` and `no` as words (a flag has no other way to say null)."""
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "no", "") else value


def _int_or_list(value: Any) -> Any:
    """`1024` or `1024,512` from a flag, as AutoTrain's --block-size takes it."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip("[]").split(",")]
        return parts[0] if len(parts) == 1 else parts
    return value


def _no_bool(value: Any) -> Any:
    """YAML's `true` is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _flag_word(value: Any) -> Any:
    """`true` and `false` from a flag, where the field may be a path as well."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


Word = Annotated[str | None, BeforeValidator(_none_word)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Strategy = Literal["no", "steps", "epoch"]


def _strategy_word(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false


class TrainConfig(BaseModel):
    """Everything a rank needs to know. Field order is the order of the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=False)

    # --- the run
    model: str = Field("gpt2", min_length=1, description="Model folder, or id on the hub.")
    project_name: str = Field(
        "project-name", min_length=1, description="Folder of the run, inside the working folder."
    )
    trainer: Literal["default", "sft", "reward", "dpo", "orpo"] = Field(
        "default", description="What is trained. `task: llm-sft` sets it too. This version runs: sft."
    )
    log: Literal["none", "tensorboard", "wandb"] = Field("none", description="Experiment tracker.")
    run_name: str | None = Field(None, description="Name of the run in the tracker. Default: project_name.")
    seed: Int = Field(42, ge=0, lt=2**32, description="Seed of weights, dropout and data order.")
    data_seed: Int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the data order alone. Default: seed."
    )
    resume: Annotated[bool | str, BeforeValidator(_flag_word)] = Field(
        False, description="true: go on from the newest checkpoint of the run. A path: from that checkpoint."
    )
    overwrite: bool = Field(False, description="Delete the run that project_name holds and start anew.")

    # --- data
    data_path: str = Field(
        "data", min_length=1, description="Folder or file (CSV, JSONL, JSON, Parquet), or hub id."
    )
    train_split: str = Field(
        "train", min_length=1, description="Split to train on; `config:split` on the hub."
    )
    valid_split: Word = Field(None, description="Split to evaluate on. null: no evaluation.")
    chat_template: Annotated[Literal["zephyr", "chatml", "tokenizer"] | None, BeforeValidator(_none_word)] = (
        Field(
            None,
            description="How turns become text: zephyr, chatml, tokenizer (its own), or null.",
        )
    )
    text_column: str = Field("text", description="Column with the text, the messages, or the completion.")
    prompt_text_column: str | None = Field(
        None, description="Column with the prompt; text_column is its completion."
    )
    rejected_text_column: str | None = Field(
        None, description="Column with the rejected answer (preference data)."
    )
    add_eos_token: bool = Field(True, description="End each document with the EOS token, and train on it.")
    train_on: Literal["auto", "all", "completion"] = Field(
        "auto",
        description="What the loss sees. auto: completions and assistant turns, where rows have them.",
    )
    packing: Literal["auto", "bfd", "none"] = Field(
        "auto",
        description="bfd: documents share a block and do not see each other. none: one a row. auto: bfd.",
    )
    block_size: Annotated[Int | Annotated[list[Int], Field(min_length=1)], BeforeValidator(_int_or_list)] = (
        Field(
            -1,
            description="Longest sequence in tokens. -1: model_max_length, at most 1024. A list: dpo, orpo.",
        )
    )
    model_max_length: Int = Field(
        2048, gt=0, description="Longest sequence, in tokens, that the model may see."
    )
    max_prompt_length: Int = Field(128, gt=0, description="Longest prompt in tokens (dpo, orpo).")
    max_completion_length: Int | None = Field(
        None, gt=0, description="Longest completion in tokens (dpo, orpo)."
    )
    padding: Annotated[Literal["left", "right"] | None, BeforeValidator(_none_word)] = Field(
        "right", description="Padding side of the saved tokenizer; batches in training are padded right."
    )

    # --- optimisation
    lr: Float = Field(3e-5, ge=0, description="Peak learning rate.")
    epochs: Float = Field(1, gt=0, description="Passes over the training data.")
    max_steps: Int = Field(-1, ge=-1, description="Optimiser steps; overrides epochs. -1: by epochs.")
    batch_size: Int = Field(
        2, gt=0, description="Micro-batch: rows (blocks, when packed) a rank takes at a time."
    )
    per_device_eval_batch_size: Int | None = Field(
        None, gt=0, description="Evaluation rows a rank. Default: batch_size."
    )
    gradient_accumulation: Int = Field(
        4, gt=0, description="Micro-batches a rank sums before an optimiser step."
    )
    auto_find_batch_size: bool = Field(
        False, description="Halve the micro-batch when memory runs out (one process)."
    )
    optimizer: str = Field(
        "adamw_torch", description="Any optimiser name of transformers' TrainingArguments.optim."
    )
    scheduler: str = Field("linear", description="Any scheduler name of transformers.")
    warmup_ratio: Float = Field(
        0.1, ge=0, le=1, description="Part of the steps that warms up the learning rate."
    )
    warmup_steps: Int | None = Field(None, ge=0, description="Steps of warm-up; overrides warmup_ratio.")
    weight_decay: Float = Field(0.0, ge=0, description="Weight decay.")
    max_grad_norm: Float = Field(1.0, ge=0, description="Gradient norm is clipped to this; 0: not clipped.")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="Adam's first beta.")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="Adam's second beta.")
    adam_epsilon: Float = Field(1e-8, gt=0, description="Adam's epsilon.")
    mixed_precision: Annotated[Literal["fp16", "bf16"] | None, BeforeValidator(_none_word)] = Field(
        None, description="Compute type over float32 master weights; null: float32 throughout."
    )
    use_flash_attention_2: bool = Field(False, description="Use the flash-attn package (CUDA, fp16 or bf16).")
    disable_gradient_checkpointing: bool = Field(
        False, description="true: keep activations (faster, more memory)."
    )
    dataloader_num_workers: Int = Field(0, ge=0, description="Processes a rank uses to collate batches.")

    # --- logging, evaluation, saving
    logging_steps: Int = Field(-1, ge=-1, description="Steps between logs. -1: a fifth of the data, 1 to 25.")
    eval_strategy: Annotated[Strategy, BeforeValidator(_strategy_word)] = Field(
        "epoch", description="When to evaluate, if there is a valid_split."
    )
    eval_steps: Int | None = Field(
        None, gt=0, description="Steps between evaluations (eval_strategy: steps)."
    )
    save_strategy: Annotated[Strategy | None, BeforeValidator(_strategy_word)] = Field(
        None, description="When to write a checkpoint. Default: steps where save_steps is given, else epoch."
    )
    save_steps: Int | None = Field(
        None, gt=0, description="Steps between checkpoints (save_strategy: steps)."
    )
    save_total_limit: Int = Field(1, gt=0, description="Checkpoints kept.")
    load_best_model_at_end: bool | None = Field(
        None,
        description="End with the lowest eval_loss. Default: true where every save has its loss.",
    )

    # --- peft and quantisation
    peft: bool = Field(False, description="Train LoRA adapters instead of the whole model.")
    lora_r: Int = Field(16, gt=0, description="Rank of the LoRA matrices.")
    lora_alpha: Int = Field(32, gt=0, description="LoRA's alpha; the update is scaled by alpha / r.")
    lora_dropout: Float = Field(0.05, ge=0, lt=1, description="Dropout inside the adapters.")
    target_modules: Word = Field("all-linear", description="Comma-separated module names, or all-linear.")
    quantization: Annotated[Literal["int4", "int8"] | None, BeforeValidator(_none_word)] = Field(
        "int4",
        description="Quantise the frozen base model with bitsandbytes; needs peft. null: not quantised.",
    )
    merge_adapter: bool = Field(False, description="Merge the adapter into the base model at the end.")

    # --- preference trainers
    model_ref: str | None = Field(None, description="Reference model (dpo).")
    dpo_beta: Float = Field(0.1, gt=0, description="Beta (dpo).")

    # --- hub
    push_to_hub: bool = Field(False, description="Upload the final model to username/project_name, private.")
    username: str | None = Field(None, description="Account on the hub.")
    token: str | None = Field(
        None, repr=False, description="Hub token; ${HF_TOKEN} keeps it out of the file."
    )

    # --- how it is spread
    unsloth: bool = Field(False, description="AutoTrain's switch; has no effect here.")
    distributed_backend: Annotated[
        Literal["auto", "ddp", "fsdp", "deepspeed", "none"],
        BeforeValidator(lambda v: "auto" if v is None else v),
    ] = Field("auto", description="auto, ddp, fsdp, deepspeed, or none for one process.")

    @property
    def sequence_length(self) -> int:
        """The longest sequence in tokens: block_size, its first entry where it is a list."""
        return self.block_size[0] if isinstance(self.block_size, list) else self.block_size

    @property
    def packed(self) -> bool:
        """Whether documents share a block."""
        return self.packing in ("auto", "bfd")

    def without_effect(self) -> dict[str, str]:
        """Fields that the user set and that do nothing in this run, with the reason."""
        idle: dict[str, tuple[str, ...]] = {}
        if self.trainer == "sft":
            idle["it belongs to preference trainers"] = PREFERENCE_FIELDS
        if not self.peft:
            idle["peft is off"] = LORA_FIELDS
        if self.eval_strategy != "steps":
            idle["eval_strategy is not steps"] = ("eval_steps",)
        if self.valid_split is None:
            idle["there is no valid_split"] = ("eval_steps", "per_device_eval_batch_size")
        if self.save_strategy not in (None, "steps"):
            idle["save_strategy is not steps"] = ("save_steps",)
        if self.max_steps > 0:
            idle["max_steps is set"] = ("epochs",)
        if self.warmup_steps is not None:
            idle["warmup_steps is set"] = ("warmup_ratio",)
        return {name: why for why, names in idle.items() for name in names if name in self.model_fields_set}

    def problems(self) -> list[tuple[str, str]]:
        """Rules across fields that fail: (field, message) each."""
        found = _length_problems(self)
        if self.trainer not in AVAILABLE_TRAINERS:
            found.append(
                ("trainer", f"'{self.trainer}' is not available in this version. Available: "
                            f"{', '.join(AVAILABLE_TRAINERS)} (task: llm-sft)."))  # fmt: skip
        if self.quantization and not self.peft:
            found.append(
                ("quantization", f"{self.quantization} weights cannot be trained themselves. "
                                 "Set peft: true, or quantization: null."))  # fmt: skip
        if self.save_strategy == "steps" and self.save_steps is None:
            found.append(("save_strategy", "steps needs save_steps, for example save_steps: 100."))
        if self.eval_strategy == "steps" and self.eval_steps is None and self.valid_split:
            found.append(("eval_strategy", "steps needs eval_steps, for example eval_steps: 100."))
        if self.push_to_hub and not (self.username and self.token):
            found.append(
                ("push_to_hub", "username and token are needed, for example username: ${HF_USERNAME}.")
            )
        if self.resume and self.overwrite:
            found.append(("resume", "resume and overwrite contradict each other. Choose one."))
        return found


def _length_problems(config: TrainConfig) -> list[tuple[str, str]]:
    """AutoTrain's five length rules (its documentation, "Task specific parameters")."""
    block, limit = config.sequence_length, config.model_max_length
    found = []
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
        # A prompt length that nobody set does not forbid a short block_size.
        if name != "block_size" and name not in config.model_fields_set:
            continue
        if value is not None and bound > 0 and value > bound:
            found.append((name, f"{value} is above {other} ({bound}). Lower {name} or raise {other}."))
    return found
