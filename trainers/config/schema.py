"""The schema of model, data, optimisation and each trainer: AutoTrain Advanced's LLM parameters, and more.

This module imports only pydantic, so the launcher can check a run without importing torch. The errors of
a config file, the command-line flags, the JSON schema and the table in docs/config.md all come from it. The
defaults are AutoTrain's, so that its configs keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainers.config.field_types import (
    Float,
    Int,
    OptionalText,
    Strategy,
    TemplateName,
    as_list,
    int_or_list,
    names,
    read_bool,
    read_checkpointing,
    read_none,
    read_sources,
    read_strategy,
    read_variables,
)
from trainers.config.kinds import KINDS, TrainerKind, TrainerName, trainers

BLOCK_SIZE_LIMIT = 1024  # AutoTrain's value for block_size: -1, unless model_max_length is lower

# Sections of --help and of docs/config.md: the title, and the first field of the section.
SECTIONS = {
    "Run": "project_name",
    "Model": "model",
    "Data": "data_path",
    "Optimisation": "lr",
    "Memory and speed": "mixed_precision",
    "Evaluation and saving": "eval_strategy",
    "LoRA and quantisation": "peft",
    "Trainer-specific parameters": "model_ref",
    "Logging and tracking": "log",
    "Hub": "push_to_hub",
    "Backend": "distributed_backend",
}
SECRET_FIELDS = frozenset({"token"})
# Files and folders that a run reads. A chat template is a file if it ends with TEMPLATE_FILE. A mix has paths
# and templates of its own.
INPUT_FIELDS = ("resume", "model", "model_ref", "data_path", "mix", "chat_template")


def _only(which: Callable[[TrainerKind], bool]) -> dict[str, Any]:
    """Mark a field that has an effect only for some trainers; acts_for() reads the mark."""
    return {"trainers": list(trainers(which))}


def _named(*names: TrainerName) -> dict[str, Any]:
    """Mark a field that has an effect only for these trainers."""
    return _only(lambda kind: kind.name in names)


class TrainConfig(BaseModel):
    """All settings that a rank needs. The order of the fields is the order of the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=False)

    # Run
    project_name: str = Field(
        "project-name", min_length=1, description="Folder of the run, inside the working directory."
    )
    trainer: TrainerName = Field(
        "default", description="Trainer (docs/trainers.md). `task: llm-sft` also sets it."
    )
    resume: Annotated[bool | str, BeforeValidator(read_bool)] = Field(
        False,
        description="true: resume from the newest checkpoint that verifies, or from the start if there is "
        "none. A path: resume from that checkpoint.",
    )
    overwrite: bool = Field(
        False, description="Delete what the run in project_name wrote, and start from the beginning."
    )
    seed: Int = Field(42, ge=0, lt=2**32, description="Seed for new weights, dropout and data order.")
    data_seed: Int | None = Field(None, ge=0, lt=2**32, description="Seed for the data order. Default: seed.")

    # Model
    model: str = Field("gpt2", min_length=1, description="Model folder, or an id on the hub.")
    revision: str | None = Field(None, description="Commit, tag or branch of the model on the hub.")
    trust_remote_code: bool = Field(
        False,
        description="Run Python code from the model's folder or repository. A hub model then needs revision.",
    )

    # Data
    data_path: str = Field(
        "data",
        min_length=1,
        description="Folder or file (CSV, JSONL, JSON, Parquet), or an id on the hub.",
    )
    mix: Annotated[list[dict[str, Any]] | None, BeforeValidator(read_sources)] = Field(
        None,
        min_length=1,
        description="Several sources instead of one data_path: a list, each with path, name, weight or rows, "
        "and any key of `data` (docs/mixing.md).",
    )
    train_split: str = Field(
        "train", min_length=1, description="Split to train on. On the hub also `config:split`."
    )
    valid_split: OptionalText = Field(None, description="Split to evaluate on during the run. null: none.")
    test_split: OptionalText = Field(None, description="Split to evaluate on once, at the end of the run.")
    chat_template: Annotated[
        Literal["zephyr", "chatml", "alpaca", "phi3", "tokenizer"] | TemplateName | None,
        BeforeValidator(read_none),
    ] = Field(
        None,
        description="Format of conversations: tokenizer (its own template), chatml, zephyr, phi3, alpaca, "
        "the path of a .jinja file, default, tool_use or rag (where the tokenizer has several), or null.",
    )
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(read_variables)] = Field(
        None,
        description="More variables for the template, such as {enable_thinking: false}. A column of this "
        "name adds to them.",
    )
    history: Literal["auto", "unroll", "last", "keep"] = Field(
        "auto",
        description="Templates that rewrite earlier turns (docs/data.md). unroll: one sample for each "
        "trained turn. last: only the last turn. keep: one sample with TRL's training template, which keeps "
        "all reasoning. auto: unroll where the template rewrites.",
        json_schema_extra=_named("default", "sft"),
    )
    unrendered: Literal["error", "drop"] = Field(
        "error",
        description="A field of a message that the template does not render: an error, or drop the row and "
        "count it.",
    )
    system_prompt: str | None = Field(
        None, description="System turn for conversations that have none. A column `system` comes first."
    )
    text_column: str = Field(
        "text", description="Column with the text, the messages, the completion, or the better answer."
    )
    prompt_text_column: str | None = Field(
        None, description="Column with the prompt. text_column then has its completion."
    )
    prompt_format: str | None = Field(
        None,
        description="Build the prompt from several columns: 'Q: {question} {context}'. Default: one column.",
    )
    rejected_text_column: str | None = Field(
        None,
        description="Column with the rejected answer.",
        json_schema_extra=_only(lambda kind: kind.preference),
    )
    label_column: str = Field(
        "label",
        description="Column with the label of a completion: wanted (true, 1) or not (false, 0).",
        json_schema_extra=_named("kto"),
    )
    train_on: Literal["auto", "all", "completion", "last"] = Field(
        "auto",
        description="Tokens in the loss: all, completion (completions and assistant turns), or last (the "
        "last assistant turn). auto: completion if the rows separate it, else all; for the default trainer "
        "always all.",
        json_schema_extra=_only(lambda kind: kind.chooses_tokens),
    )
    roles_to_train: Annotated[
        list[Literal["system", "user", "assistant", "tool"]], BeforeValidator(as_list)
    ] = Field(
        ["assistant"],
        min_length=1,
        description="Roles of messages whose turns are in the loss.",
        json_schema_extra=_named("default", "sft"),
    )
    block_size: Annotated[Int | Annotated[list[Int], Field(min_length=1)], BeforeValidator(int_or_list)] = (
        Field(
            -1,
            description="Maximum length of a sequence, in tokens. -1: model_max_length, but at most 1024. "
            "For dpo, orpo and kto, a list also sets max_prompt_length and max_completion_length.",
        )
    )
    model_max_length: Int = Field(
        2048,
        gt=0,
        description="Maximum sequence length of the model, in tokens. Also saved in the tokenizer.",
    )
    max_prompt_length: Int = Field(
        128,
        gt=0,
        description="Maximum length of a prompt, in tokens. The end is kept.",
        json_schema_extra=_only(lambda kind: kind.prompted),
    )
    max_completion_length: Int | None = Field(
        None,
        gt=0,
        description="Maximum length of a completion, in tokens. The start is kept.",
        json_schema_extra=_only(lambda kind: kind.prompted),
    )
    packing: Literal["auto", "bfd", "wrapped", "none"] = Field(
        "auto",
        description="How samples share a sequence. bfd: complete samples. wrapped: samples are joined and "
        "cut at block_size (default, sft). none: one sample per sequence, padded. auto: wrapped for the "
        "default trainer, else bfd. Samples never see each other.",
        json_schema_extra=_only(lambda kind: kind.packs),
    )
    add_eos_token: bool = Field(
        True,
        description="End each text with the EOS token, and train on this token.",
        json_schema_extra=_only(lambda kind: kind.packs),
    )
    padding: Annotated[Literal["left", "right"] | None, BeforeValidator(read_none)] = Field(
        "right", description="Padding side of the saved tokenizer. Training always pads on the right."
    )
    valid_fraction: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the training rows to hold out for evaluation (no valid_split).",
    )
    test_fraction: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the training rows to hold out for the end of the run (no test_split).",
    )
    split_seed: Int = Field(
        42,
        ge=0,
        lt=2**32,
        description="Seed for the choice of the held-out rows. It does not depend on seed.",
    )

    # Optimisation
    lr: Float = Field(3e-5, ge=0, description="Peak learning rate.")
    epochs: Float = Field(1, gt=0, description="Number of passes over the training split.")
    max_steps: Int = Field(
        -1, ge=-1, description="Optimiser steps, at least 1. Overrides epochs. -1: use epochs."
    )
    batch_size: Int = Field(
        2, gt=0, description="Size of a micro-batch on each rank: packs, or samples if nothing is packed."
    )
    gradient_accumulation: Int = Field(
        4, gt=0, description="Micro-batches on each rank in an optimiser step."
    )
    tokens_per_batch: Int | None = Field(
        None,
        gt=0,
        description="Size of a micro-batch in tokens: as many samples (pairs) as fit. Replaces batch_size.",
        json_schema_extra=_only(lambda kind: kind.planned),
    )
    auto_find_batch_size: bool = Field(
        False,
        description="If memory runs out, restart from the newest checkpoint with half the batch_size and "
        "twice the gradient_accumulation.",
    )
    optimizer: str = Field(
        "adamw_torch", description="Optimiser: any name of transformers' TrainingArguments.optim."
    )
    scheduler: str = Field(
        "linear",
        description="Learning rate scheduler: any name of transformers that needs no arguments of its own.",
    )
    warmup_ratio: Float = Field(
        0.1, ge=0, le=1, description="Fraction of the steps for the warm-up of the learning rate."
    )
    warmup_steps: Int | None = Field(None, ge=0, description="Warm-up steps. Overrides warmup_ratio.")
    weight_decay: Float = Field(0.0, ge=0, description="Weight decay.")
    max_grad_norm: Float = Field(1.0, ge=0, description="Maximum gradient norm (clipping). 0: no clipping.")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="Adam's first beta.")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="Adam's second beta.")
    adam_epsilon: Float = Field(1e-8, gt=0, description="Adam's epsilon.")

    # Memory and speed
    mixed_precision: Annotated[Literal["fp16", "bf16"] | None, BeforeValidator(read_none)] = Field(
        None,
        description="Type of the matrix products. Trained weights stay float32. null: all float32.",
    )
    activation_checkpointing: Annotated[
        Literal["none", "full", "selective", "offload"], BeforeValidator(read_checkpointing)
    ] = Field(
        "full",
        description="What a layer keeps for its backward. none: all activations (fastest, most memory). "
        "full: its input. selective: its input and the output of attention. offload: as full, in host "
        "memory (GPUs).",
    )
    attention: Literal[
        "auto", "flash_attention_2", "varlen", "flex_attention", "documents", "sdpa", "eager"
    ] = Field(
        "auto", description="Implementation of attention (docs/packing.md). auto: the fastest that works."
    )
    use_flash_attention_2: bool = Field(False, description="Use the package flash-attn (CUDA, fp16 or bf16).")
    torch_compile: bool = Field(False, description="Compile the repeated layers with torch.compile.")
    use_kernels: bool = Field(
        False, description="Use kernels from the hub for layers that have one (package kernels, GPUs)."
    )
    dataloader_num_workers: Int = Field(0, ge=0, description="Processes on each rank that collate batches.")

    # Evaluation and saving
    eval_strategy: Annotated[Strategy, BeforeValidator(read_strategy)] = Field(
        "epoch", description="When to evaluate. Needs valid_split or valid_fraction."
    )
    eval_steps: Int | None = Field(
        None, gt=0, description="Steps between evaluations (eval_strategy: steps)."
    )
    eval_on_start: bool = Field(False, description="Also evaluate before the first step.")
    per_device_eval_batch_size: Int | None = Field(
        None, gt=0, description="batch_size of an evaluation. Default: batch_size."
    )
    eval_packing: bool | None = Field(
        None,
        description="Evaluate packed (true) or padded (false). The loss is the same. Default: as packing.",
        json_schema_extra=_only(lambda kind: kind.packs),
    )
    save_strategy: Annotated[Strategy | None, BeforeValidator(read_strategy)] = Field(
        None, description="When to write a checkpoint. Default: steps if save_steps is set, else epoch."
    )
    save_steps: Int | None = Field(
        None, gt=0, description="Steps between checkpoints (save_strategy: steps)."
    )
    save_minutes: Float | None = Field(
        None, gt=0, description="Minutes between checkpoints, in addition to save_strategy."
    )
    save_total_limit: Int = Field(
        1,
        gt=0,
        description="Number of checkpoints to keep: the newest ones. The best one is kept in addition.",
    )
    load_best_model_at_end: bool | None = Field(
        None,
        description="End with the weights of the lowest eval_loss. Default: true if every checkpoint has an "
        "eval_loss.",
    )

    # LoRA and quantisation
    peft: bool = Field(False, description="Train LoRA adapters instead of the full model.")
    lora_r: Int = Field(16, gt=0, description="Rank of the LoRA matrices.")
    lora_alpha: Int = Field(32, gt=0, description="LoRA's alpha. The update is scaled by alpha / r.")
    lora_dropout: Float = Field(0.05, ge=0, lt=1, description="Dropout in the adapters.")
    target_modules: OptionalText | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter: all-linear; names (a list, or comma-separated); or a "
        "regular expression that matches full names.",
    )
    use_dora: bool = Field(False, description="DoRA: also learn a magnitude (arXiv 2402.09353).")
    use_rslora: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(r) (arXiv 2312.03732).")
    quantization: Annotated[Literal["int4", "int8"] | None, BeforeValidator(read_none)] = Field(
        "int4",
        description="Quantise the frozen base model with bitsandbytes. Needs peft. null: no quantisation.",
    )
    double_quantization: bool = Field(
        False, description="With int4, also quantise the quantisation constants (saves 0.4 bits per weight)."
    )
    merge_adapter: bool = Field(
        False, description="Merge the adapter into the base model at the end. Refused if the outputs change."
    )

    # Trainer-specific parameters
    model_ref: str | None = Field(
        None,
        description="Reference model. Default: the base model before training.",
        json_schema_extra=_only(lambda kind: kind.reference),
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="Run the reference model once, before training, and free its memory.",
        json_schema_extra=_only(lambda kind: kind.reference),
    )
    loss_type: Annotated[str | list[str] | None, BeforeValidator(names)] = Field(
        None,
        description="Loss of dpo (a name, or a list to add up; default: sigmoid) or kto (default: kto).",
        json_schema_extra=_only(lambda kind: kind.reference),
    )
    label_smoothing: Float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Fraction of pairs that are assumed to have swapped labels (robust, exo_pair, aot, "
        "aot_unpaired).",
        json_schema_extra=_named("dpo"),
    )
    dpo_beta: Float = Field(
        0.1,
        gt=0,
        description="Higher values keep dpo closer to the reference.",
        json_schema_extra=_named("dpo"),
    )
    orpo_beta: Float = Field(
        0.1,
        gt=0,
        description="Weight of the odds ratio loss (lambda in the paper).",
        json_schema_extra=_named("orpo"),
    )
    kto_beta: Float = Field(
        0.1,
        gt=0,
        description="Higher values keep kto closer to the reference.",
        json_schema_extra=_named("kto"),
    )
    desirable_weight: Float = Field(
        1.0, gt=0, description="Weight of wanted completions.", json_schema_extra=_named("kto")
    )
    undesirable_weight: Float = Field(
        1.0, gt=0, description="Weight of unwanted completions.", json_schema_extra=_named("kto")
    )
    center_rewards_coefficient: Float | None = Field(
        None,
        gt=0,
        description="Weight of a penalty that keeps the sum of a pair's rewards near 0 (arXiv 2312.09244).",
        json_schema_extra=_named("reward"),
    )
    mlm_probability: Float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Fraction of the tokens to hide and predict.",
        json_schema_extra=_named("mlm"),
    )

    # Logging and tracking
    log: Literal["none", "tensorboard", "wandb"] = Field("none", description="Experiment tracker.")
    logging_steps: Int = Field(
        -1,
        ge=-1,
        description="Optimiser steps between logs. -1: a fifth of the batches of the evaluation split (else "
        "of the training split), from 1 to 25.",
    )
    run_name: str | None = Field(
        None, description="Name of the run in the tracker. Default: WANDB_NAME (wandb), else project_name."
    )
    wandb_project: str | None = Field(
        None, description="wandb project. Default: WANDB_PROJECT, else project_name."
    )
    wandb_entity: str | None = Field(None, description="wandb team or account. Default: WANDB_ENTITY.")

    # Hub
    push_to_hub: bool = Field(
        False, description="Upload the final model to username/project_name. A new repository is private."
    )
    username: str | None = Field(None, description="Account on the hub.")
    token: str | None = Field(
        None,
        repr=False,
        description="Hub token. Default: HF_TOKEN, else the file that `hf auth login` wrote.",
    )

    # Backend
    distributed_backend: Annotated[
        Literal["auto", "ddp", "fsdp", "deepspeed", "none"],
        BeforeValidator(lambda v: "auto" if v is None else v),
    ] = Field("auto", description="auto, ddp, fsdp, deepspeed, or none (one process).")
    unsloth: bool = Field(
        False, description="A parameter of AutoTrain, without effect.", json_schema_extra=_named()
    )

    def public(self) -> dict[str, Any]:
        """Return the values as JSON types, without secrets."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in SECRET_FIELDS}

    @property
    def kind(self) -> TrainerKind:
        """The properties of the trainer."""
        return KINDS[self.trainer]

    @property
    def sequence_length(self) -> int:
        """The maximum length of a sequence, in tokens: block_size, or its first entry if it is a list."""
        return self.block_size[0] if isinstance(self.block_size, list) else self.block_size

    @property
    def packed(self) -> Literal["bfd", "wrapped", "none"]:
        """How samples share a sequence in this run."""
        if self.packing == "auto" or not self.kind.packs:
            return self.kind.default_packing
        return self.packing

    @property
    def token_budget(self) -> int | None:
        """tokens_per_batch, or None if the trainer does not use it."""
        return self.tokens_per_batch if self.kind.planned else None

    @property
    def evaluates_packed(self) -> bool:
        """Whether evaluation is packed, so that it computes no padding."""
        return self.packed != "none" if self.eval_packing is None else self.eval_packing

    @property
    def validates(self) -> bool:
        """Whether a split is evaluated during the run."""
        return self._holds_out("valid_split", "valid_fraction")

    @property
    def tests(self) -> bool:
        """Whether a split is evaluated at the end of the run."""
        return self._holds_out("test_split", "test_fraction")

    def _holds_out(self, split: str, fraction: str) -> bool:
        one = {split: getattr(self, split), fraction: getattr(self, fraction)}
        return any(
            source.get(split) is not None or source.get(fraction, 0) > 0 for source in self.mix or [one]
        )

    @property
    def loss_types(self) -> list[str]:
        """The losses to add up (dpo, kto)."""
        if self.loss_type is None:
            return list(self.kind.losses[:1])
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    @property
    def trains_on_all(self) -> bool:
        """Whether the loss is on every token, even if rows separate prompt and completion."""
        return self.train_on == "all" or (self.train_on == "auto" and self.kind.trains_on_all)

    @property
    def lora_targets(self) -> str | list[str] | None:
        """target_modules for peft: a list matches the ends of names, a string is a regular expression."""
        asked = self.target_modules
        if asked is None or isinstance(asked, list) or asked == "all-linear":
            return asked
        if any(sign in asked for sign in "*+?()[]{}|^$\\"):
            return asked
        return [name.strip() for name in asked.split(",")]


def acts_for(field: str) -> tuple[str, ...]:
    """Return the trainers for which a field has an effect."""
    extra: Any = TrainConfig.model_fields[field].json_schema_extra
    return tuple(extra["trainers"]) if extra else trainers()


def sections() -> list[tuple[str, list[str]]]:
    """Return the sections in the order of the documentation, each as (title, names of its fields)."""
    titles = {first: title for title, first in SECTIONS.items()}
    found: list[tuple[str, list[str]]] = []
    for name in TrainConfig.model_fields:
        if name in titles:
            found.append((titles[name], []))
        found[-1][1].append(name)
    return found
