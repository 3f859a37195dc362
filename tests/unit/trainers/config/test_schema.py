"""The fields of the trainer's config: AutoTrain's defaults, and a description of each."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config import LaunchConfig, SlurmConfig
from trainers.config.schema import TrainConfig

AUTOTRAIN_DEFAULTS = {
    "model": "gpt2",
    "project_name": "project-name",
    "data_path": "data",
    "train_split": "train",
    "valid_split": None,
    "add_eos_token": True,
    "block_size": -1,
    "model_max_length": 2048,
    "padding": "right",
    "trainer": "default",
    "use_flash_attention_2": False,
    "log": "none",
    "logging_steps": -1,
    "eval_strategy": "epoch",
    "save_total_limit": 1,
    "auto_find_batch_size": False,
    "mixed_precision": None,
    "lr": 3e-5,
    "epochs": 1,
    "batch_size": 2,
    "warmup_ratio": 0.1,
    "gradient_accumulation": 4,
    "optimizer": "adamw_torch",
    "scheduler": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "chat_template": None,
    "quantization": "int4",
    "target_modules": "all-linear",
    "merge_adapter": False,
    "peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "model_ref": None,
    "dpo_beta": 0.1,
    "max_prompt_length": 128,
    "max_completion_length": None,
    "prompt_text_column": None,
    "text_column": "text",
    "rejected_text_column": None,
    "push_to_hub": False,
    "username": None,
    "token": None,
    "unsloth": False,
}


def test_every_parameter_of_autotrain_has_its_default() -> None:
    config = TrainConfig()
    assert {name: getattr(config, name) for name in AUTOTRAIN_DEFAULTS} == AUTOTRAIN_DEFAULTS
    assert config.activation_checkpointing == "full"  # disable_gradient_checkpointing: false
    assert config.distributed_backend == "auto"
    assert TrainConfig(distributed_backend=None).distributed_backend == "auto"


@pytest.mark.parametrize("model", [TrainConfig, LaunchConfig, SlurmConfig])
def test_every_field_has_a_description(model: type[Any]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
