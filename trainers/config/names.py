"""The names of fields for users: the sections of a config file, and the names that other tools use."""

from __future__ import annotations

from trainers.config.kinds import KINDS

# The name of a field in other tools (AutoTrain, Hugging Face's TrainingArguments, TRL) -> our field.
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
    "bnb_4bit_use_double_quant": "double_quantization",
    "model_revision": "revision",
    "ref_model": "model_ref",
    "use_liger_kernel": "use_kernels",
}
# Names that switch a field on or off: (field, its value for true, its value for false).
SWITCHES = {
    "gradient_checkpointing": ("activation_checkpointing", "full", "none"),
    "disable_gradient_checkpointing": ("activation_checkpointing", "none", "full"),  # AutoTrain's
}
TASKS = ("llm", "lm_training", "llm-generic", *(f"llm-{name}" for name in KINDS))
TOP_KEYS = {"base_model": "model", "project_name": "project_name", "log": "log"}
DATA_KEYS = {
    "path": "data_path",
    "mix": "mix",
    "train_split": "train_split",
    "valid_split": "valid_split",
    "test_split": "test_split",
    "valid_fraction": "valid_fraction",
    "test_fraction": "test_fraction",
    "split_seed": "split_seed",
    "chat_template": "chat_template",
    "chat_template_kwargs": "chat_template_kwargs",
    "history": "history",
    "unrendered": "unrendered",
    "system_prompt": "system_prompt",
    "train_on": "train_on",
    "roles_to_train": "roles_to_train",
    "prompt_format": "prompt_format",
}
COLUMN_KEYS = ("text_column", "prompt_text_column", "rejected_text_column", "label_column")
# AutoTrain's own documentation also writes these three without the suffix.
COLUMN_ALIASES = {
    "text": "text_column",
    "prompt": "prompt_text_column",
    "rejected_text": "rejected_text_column",
    "label": "label_column",
}
HUB_KEYS = ("username", "token", "push_to_hub")
LAUNCHER_SECTIONS = ("launch", "slurm")
SECTIONS = ("task", "backend", *TOP_KEYS, "data", "params", "hub", *LAUNCHER_SECTIONS)
