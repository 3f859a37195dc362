"""The schema of model, data, optimisation and each trainer: AutoTrain Advanced's LLM parameters, and ours.

Pydantic only: the launcher imports this module to check a run without importing torch. One schema gives the
errors of a config file, the command-line flags, the JSON schema and the table in docs/config.md.
Defaults are AutoTrain's, so that its configs mean here what they meant there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainers.config.field_types import (
    Float,
    Int,
    Strategy,
    Word,
    checkpointing_word,
    flag_word,
    int_or_list,
    names,
    none_word,
    strategy_word,
)
from trainers.config.kinds import KINDS, TrainerKind, TrainerName, trainers

BLOCK_SIZE_LIMIT = 1024  # what AutoTrain makes of block_size: -1

# Sections of --help and of docs/config.md: the title, and the field that it begins with.
SECTIONS = {
    "Run": "project_name",
    "Model": "model",
    "Data": "data_path",
    "Optimisation": "lr",
    "Memory and speed": "mixed_precision",
    "Evaluation and saving": "eval_strategy",
    "LoRA and quantisation": "peft",
    "One trainer's own": "model_ref",
    "Logging and tracking": "log",
    "Hub": "push_to_hub",
    "Backend": "distributed_backend",
}
SECRET_FIELDS = frozenset({"token"})


def _only(which: Callable[[TrainerKind], bool]) -> dict[str, Any]:
    """Mark a field that acts only for the trainers of which this holds; acts_for() reads it."""
    return {"trainers": list(trainers(which))}


def _named(*names: TrainerName) -> dict[str, Any]:
    """Mark a field that belongs to these trainers."""
    return _only(lambda kind: kind.name in names)


class TrainConfig(BaseModel):
    """Everything a rank needs to know. Field order is the order of the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=False)

    # Run
    project_name: str = Field(
        "project-name", min_length=1, description="Folder of the run, inside the working folder."
    )
    trainer: TrainerName = Field(
        "default", description="What is trained (docs/trainers.md). `task: llm-sft` sets it too."
    )
    resume: Annotated[bool | str, BeforeValidator(flag_word)] = Field(
        False,
        description="true: go on from the newest checkpoint of the run that verifies, or from the start "
        "where it wrote none. A path: from that checkpoint.",
    )
    overwrite: bool = Field(False, description="Delete the run that project_name holds and start anew.")
    seed: Int = Field(42, ge=0, lt=2**32, description="Seed of weights, dropout and data order.")
    data_seed: Int | None = Field(
        None, ge=0, lt=2**32, description="Seed of the data order alone. Default: seed."
    )

    # Model
    model: str = Field("gpt2", min_length=1, description="Model folder, or id on the hub.")
    revision: str | None = Field(None, description="Commit, tag or branch of the model on the hub.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that lies beside the model; needs revision, so that it is pinned."
    )

    # Data
    data_path: str = Field(
        "data", min_length=1, description="Folder or file (CSV, JSONL, JSON, Parquet), or hub id."
    )
    train_split: str = Field(
        "train", min_length=1, description="Split to train on; `config:split` on the hub."
    )
    valid_split: Word = Field(None, description="Split to evaluate on. null: no evaluation.")
    test_split: Word = Field(None, description="Split to evaluate on once, at the end of the run.")
    chat_template: Annotated[
        Literal["zephyr", "chatml", "alpaca", "phi3", "tokenizer"] | None, BeforeValidator(none_word)
    ] = Field(
        None,
        description="How turns become text: tokenizer (its own), chatml, zephyr, phi3, alpaca, or null.",
    )
    text_column: str = Field("text", description="Column with the text, the messages, or the completion.")
    prompt_text_column: str | None = Field(
        None, description="Column with the prompt; text_column is its completion."
    )
    prompt_format: str | None = Field(
        None,
        description="Prompt made of several columns, such as 'Q: {question} {context}'. Default: one column.",
    )
    rejected_text_column: str | None = Field(
        None,
        description="Column with the rejected answer.",
        json_schema_extra=_only(lambda kind: kind.preference),
    )
    label_column: str = Field(
        "label",
        description="Column that says whether a completion is wanted (true, 1) or not (false, 0).",
        json_schema_extra=_named("kto"),
    )
    train_on: Literal["auto", "all", "completion"] = Field(
        "auto",
        description="What the loss sees. auto: completions and assistant turns, where rows have them; all "
        "with the default trainer.",
        json_schema_extra=_only(lambda kind: kind.chooses_tokens),
    )
    block_size: Annotated[Int | Annotated[list[Int], Field(min_length=1)], BeforeValidator(int_or_list)] = (
        Field(
            -1,
            description="Longest sequence in tokens. -1: model_max_length, at most 1024. With dpo, orpo and "
            "kto a list sets max_prompt_length and max_completion_length too.",
        )
    )
    model_max_length: Int = Field(
        2048, gt=0, description="Longest sequence, in tokens, that the model may see."
    )
    max_prompt_length: Int = Field(
        128,
        gt=0,
        description="Longest prompt in tokens; its end is kept.",
        json_schema_extra=_only(lambda kind: kind.prompted),
    )
    max_completion_length: Int | None = Field(
        None,
        gt=0,
        description="Longest completion in tokens; its start is kept.",
        json_schema_extra=_only(lambda kind: kind.prompted),
    )
    packing: Literal["auto", "bfd", "wrapped", "none"] = Field(
        "auto",
        description="bfd: documents share a sequence. wrapped: they are joined and cut into full blocks "
        "(default, sft). none: one a row, padded. They never see each other. auto: wrapped with the default "
        "trainer, else bfd.",
        json_schema_extra=_only(lambda kind: kind.packs),
    )
    add_eos_token: bool = Field(
        True,
        description="End each document with the EOS token, and train on it.",
        json_schema_extra=_only(lambda kind: kind.packs),
    )
    padding: Annotated[Literal["left", "right"] | None, BeforeValidator(none_word)] = Field(
        "right", description="Padding side of the saved tokenizer; batches in training are padded right."
    )
    valid_fraction: Float = Field(
        0.0, ge=0, lt=1, description="Part of the training rows held out to evaluate on; no valid_split then."
    )
    test_fraction: Float = Field(
        0.0, ge=0, lt=1, description="Part of the training rows held out for the end of the run."
    )
    split_seed: Int = Field(
        42, ge=0, lt=2**32, description="Seed of what is held out; apart from seed, so that runs compare."
    )

    # Optimisation
    lr: Float = Field(3e-5, ge=0, description="Peak learning rate.")
    epochs: Float = Field(1, gt=0, description="Passes over the training data.")
    max_steps: Int = Field(-1, ge=-1, description="Optimiser steps; overrides epochs. -1: by epochs.")
    batch_size: Int = Field(
        2, gt=0, description="Micro-batch: rows (blocks, when packed) a rank takes at a time."
    )
    gradient_accumulation: Int = Field(
        4, gt=0, description="Micro-batches a rank sums before an optimiser step."
    )
    tokens_per_batch: Int | None = Field(
        None,
        gt=0,
        description="Micro-batch by tokens: documents or pairs that have at most this many together. "
        "Replaces batch_size.",
        json_schema_extra=_only(lambda kind: kind.planned),
    )
    auto_find_batch_size: bool = Field(
        False,
        description="When memory runs out, start again with half the batch_size and twice the "
        "gradient_accumulation, from the newest checkpoint.",
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

    # Memory and speed
    mixed_precision: Annotated[Literal["fp16", "bf16"] | None, BeforeValidator(none_word)] = Field(
        None, description="Compute type over float32 master weights; null: float32 throughout."
    )
    activation_checkpointing: Annotated[
        Literal["none", "full", "selective", "offload"], BeforeValidator(checkpointing_word)
    ] = Field(
        "full",
        description="What is kept for the backward. none: every activation (fastest, most memory). full: a "
        "layer's input. selective: that and what attention came to. offload: as full, in host memory (GPUs).",
    )
    attention: Literal[
        "auto", "flash_attention_2", "varlen", "flex_attention", "documents", "sdpa", "eager"
    ] = Field("auto", description="How attention is computed (docs/packing.md). auto: the fastest there is.")
    use_flash_attention_2: bool = Field(False, description="Use the flash-attn package (CUDA, fp16 or bf16).")
    torch_compile: bool = Field(False, description="Compile the repeated layers with torch.compile.")
    use_kernels: bool = Field(
        False, description="Compute with the hub's kernels where there are some (package kernels, GPUs)."
    )
    dataloader_num_workers: Int = Field(0, ge=0, description="Processes a rank uses to collate batches.")

    # Evaluation and saving
    eval_strategy: Annotated[Strategy, BeforeValidator(strategy_word)] = Field(
        "epoch", description="When to evaluate, if there is a valid_split."
    )
    eval_steps: Int | None = Field(
        None, gt=0, description="Steps between evaluations (eval_strategy: steps)."
    )
    eval_on_start: bool = Field(False, description="Evaluate before the first step too.")
    per_device_eval_batch_size: Int | None = Field(
        None, gt=0, description="Evaluation rows a rank. Default: batch_size."
    )
    eval_packing: bool | None = Field(
        None,
        description="Evaluate packed (true) or padded (false); the loss is the same. Default: as packing.",
        json_schema_extra=_only(lambda kind: kind.packs),
    )
    save_strategy: Annotated[Strategy | None, BeforeValidator(strategy_word)] = Field(
        None, description="When to write a checkpoint. Default: steps where save_steps is given, else epoch."
    )
    save_steps: Int | None = Field(
        None, gt=0, description="Steps between checkpoints (save_strategy: steps)."
    )
    save_minutes: Float | None = Field(
        None, gt=0, description="Minutes between checkpoints, next to those of save_strategy."
    )
    save_total_limit: Int = Field(
        1,
        gt=0,
        description="Checkpoints kept; the best one is kept beside them, and one that verifies always.",
    )
    load_best_model_at_end: bool | None = Field(
        None,
        description="End with the lowest eval_loss. Default: true where every save has its loss.",
    )

    # LoRA and quantisation
    peft: bool = Field(False, description="Train LoRA adapters instead of the whole model.")
    lora_r: Int = Field(16, gt=0, description="Rank of the LoRA matrices.")
    lora_alpha: Int = Field(32, gt=0, description="LoRA's alpha; the update is scaled by alpha / r.")
    lora_dropout: Float = Field(0.05, ge=0, lt=1, description="Dropout inside the adapters.")
    target_modules: Word | list[str] = Field(
        "all-linear",
        description="all-linear; names (a list, or comma-separated); or a regular expression of whole names.",
    )
    use_dora: bool = Field(False, description="DoRA: a magnitude beside LoRA's direction (arXiv 2402.09353).")
    use_rslora: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(r) (arXiv 2312.03732).")
    quantization: Annotated[Literal["int4", "int8"] | None, BeforeValidator(none_word)] = Field(
        "int4",
        description="Quantise the frozen base model with bitsandbytes; needs peft. null: not quantised.",
    )
    double_quantization: bool = Field(
        False, description="int4: quantise the quantisation constants too (0.4 bits a weight less)."
    )
    merge_adapter: bool = Field(
        False, description="Merge the adapter into the base model at the end, if the logits stay the same."
    )

    # One trainer's own
    model_ref: str | None = Field(
        None,
        description="Reference model. Default: the base model as it was.",
        json_schema_extra=_only(lambda kind: kind.reference),
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="Ask the reference model once, before training, and free its memory.",
        json_schema_extra=_only(lambda kind: kind.reference),
    )
    loss_type: Annotated[str | list[str] | None, BeforeValidator(names)] = Field(
        None,
        description="Loss of dpo (sigmoid, or several added up) and kto (kto).",
        json_schema_extra=_only(lambda kind: kind.reference),
    )
    label_smoothing: Float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Part of the pairs taken to be labelled the wrong way round (robust, exo_pair, aot).",
        json_schema_extra=_named("dpo"),
    )
    dpo_beta: Float = Field(
        0.1, gt=0, description="How close the policy stays to the reference.", json_schema_extra=_named("dpo")
    )
    orpo_beta: Float = Field(
        0.1,
        gt=0,
        description="Weight of the odds ratio (the paper's lambda).",
        json_schema_extra=_named("orpo"),
    )
    kto_beta: Float = Field(
        0.1, gt=0, description="How close the policy stays to the reference.", json_schema_extra=_named("kto")
    )
    desirable_weight: Float = Field(
        1.0, gt=0, description="Weight of the wanted completions.", json_schema_extra=_named("kto")
    )
    undesirable_weight: Float = Field(
        1.0, gt=0, description="Weight of the unwanted completions.", json_schema_extra=_named("kto")
    )
    center_rewards_coefficient: Float | None = Field(
        None,
        gt=0,
        description="Pulls the sum of each pair's rewards to zero, with this weight (arXiv 2312.09244).",
        json_schema_extra=_named("reward"),
    )
    mlm_probability: Float = Field(
        0.15, gt=0, lt=1, description="Part of the tokens that is masked.", json_schema_extra=_named("mlm")
    )

    # Logging and tracking
    log: Literal["none", "tensorboard", "wandb"] = Field("none", description="Experiment tracker.")
    logging_steps: Int = Field(-1, ge=-1, description="Steps between logs. -1: a fifth of the data, 1 to 25.")
    run_name: str | None = Field(None, description="Name of the run in the tracker. Default: project_name.")
    wandb_project: str | None = Field(
        None, description="Project in wandb. Default: WANDB_PROJECT, else project_name."
    )
    wandb_entity: str | None = Field(None, description="Team or account in wandb. Default: WANDB_ENTITY.")

    # Hub
    push_to_hub: bool = Field(False, description="Upload the final model to username/project_name, private.")
    username: str | None = Field(None, description="Account on the hub.")
    token: str | None = Field(
        None,
        repr=False,
        description="Hub token. Default: HF_TOKEN, else the file that the hub's own login wrote.",
    )

    # Backend
    distributed_backend: Annotated[
        Literal["auto", "ddp", "fsdp", "deepspeed", "none"],
        BeforeValidator(lambda v: "auto" if v is None else v),
    ] = Field("auto", description="auto, ddp, fsdp, deepspeed, or none for one process.")
    unsloth: bool = Field(
        False, description="AutoTrain's switch; has no effect here.", json_schema_extra=_named()
    )

    @property
    def kind(self) -> TrainerKind:
        """What the trainer is."""
        return KINDS[self.trainer]

    @property
    def sequence_length(self) -> int:
        """The longest sequence in tokens: block_size, its first entry where it is a list."""
        return self.block_size[0] if isinstance(self.block_size, list) else self.block_size

    @property
    def packed(self) -> Literal["bfd", "wrapped", "none"]:
        """How documents share a sequence in this run."""
        if self.packing == "auto" or not self.kind.packs:
            return self.kind.default_packing
        return self.packing

    @property
    def token_budget(self) -> int | None:
        """tokens_per_batch, where the trainer fills its micro-batches so."""
        return self.tokens_per_batch if self.kind.planned else None

    @property
    def evaluates_packed(self) -> bool:
        """Whether evaluation, too, computes no padding."""
        return self.packed != "none" if self.eval_packing is None else self.eval_packing

    @property
    def validates(self) -> bool:
        """Whether there are rows to evaluate on during the run."""
        return self.valid_split is not None or self.valid_fraction > 0

    @property
    def tests(self) -> bool:
        """Whether there are rows to evaluate on at its end."""
        return self.test_split is not None or self.test_fraction > 0

    @property
    def loss_types(self) -> list[str]:
        """The losses that are added up (dpo, kto)."""
        if self.loss_type is None:
            return list(self.kind.losses[:1])
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    @property
    def trains_on_all(self) -> bool:
        """Whether the loss sees every token, though rows may tell prompt and completion."""
        return self.train_on == "all" or (self.train_on == "auto" and self.kind.trains_on_all)

    @property
    def lora_targets(self) -> str | list[str] | None:
        """What peft calls target_modules: a list matches ends of names, a string is a regular expression."""
        asked = self.target_modules
        if asked is None or isinstance(asked, list) or asked == "all-linear":
            return asked
        if any(sign in asked for sign in "*+?()[]{}|^$\\"):
            return asked
        return [name.strip() for name in asked.split(",")]


def acts_for(field: str) -> tuple[str, ...]:
    """The trainers for which a field does something."""
    extra: Any = TrainConfig.model_fields[field].json_schema_extra
    return tuple(extra["trainers"]) if extra else trainers()


def sections() -> list[tuple[str, list[str]]]:
    """Return the fields in the order of the documentation, by section: (title, names)."""
    titles = {first: title for title, first in SECTIONS.items()}
    found: list[tuple[str, list[str]]] = []
    for name in TrainConfig.model_fields:
        if name in titles:
            found.append((titles[name], []))
        found[-1][1].append(name)
    return found
