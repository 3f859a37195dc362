"""Translate the config into transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.config.text import first_line
from trainers.model import fsdp

if TYPE_CHECKING:
    from trainers.data.loading import Part
    from trainers.data.prepare import Prepared

Arguments = TypeVar("Arguments")


def logging_steps(config: TrainConfig, data: dict[Part, Prepared]) -> int:
    """Return how many steps are between two logs.

    For logging_steps -1 this is AutoTrain's rule: a fifth of the number of micro-batches in the validation
    data (or else in the training data), from 1 to 25.
    """
    if config.logging_steps > 0:
        return config.logging_steps
    rows = len(data.get("valid", data["train"]).dataset)
    return min(max(int(0.2 * rows / config.batch_size), 1), 25)


def make_arguments(schema: Callable[..., Arguments], **values: Any) -> Arguments:
    """Build TrainingArguments.

    Raises:
        ConfigError: they reject a value.
    """
    try:
        arguments = schema(**values)
    except ValueError as error:
        raise ConfigError(f"params: {first_line(error)}") from error
    fsdp.enable_on_cpu("bf16" if values["bf16"] else "no")  # a CPU has no fp16
    return arguments


def training_arguments(config: TrainConfig, folder: Path, logging: int) -> dict[str, Any]:
    """Return the values of TrainingArguments for this config."""
    import torch

    # warmup_steps below 1 is a ratio (transformers 5); a ratio of 1.0 must not become one step.
    warmup = config.warmup_steps if config.warmup_steps is not None else min(config.warmup_ratio, 0.999999)
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.data_seed,  # if unset, the order depends on the backend
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.lr,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "lr_scheduler_type": config.scheduler,
        "optim": config.optimizer,
        "warmup_steps": warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": logging,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": config.eval_strategy if config.validates else "no",
        "eval_steps": config.eval_steps,
        "eval_on_start": config.eval_on_start and config.validates,
        "save_strategy": config.save_strategy,
        "save_steps": config.save_steps or 500,  # read only with save_strategy: steps, which needs save_steps
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": "eval_loss" if config.load_best_model_at_end else None,
        "greater_is_better": False if config.load_best_model_at_end else None,
        "report_to": "none",  # trainers/output/trackers.py reports
        "dataloader_num_workers": config.dataloader_num_workers,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "activation_checkpointing": config.activation_checkpointing != "none",  # checkpoint_layers has more
    }
