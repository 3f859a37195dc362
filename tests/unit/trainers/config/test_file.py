"""Config files: AutoTrain's configs keep their meaning, and an effective config is read as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from configs import Read, sft

from launcher.config import load_run
from trainers.config.file import effective_text, load_settings
from trainers.config.names import TASKS

FULL = """\
task: llm:sft
base_model: org/base
project_name: autotrain-run
log: tensorboard
backend: local

data:
  path: org/chat
  train_split: test
  valid_split: held-out
  chat_template: tokenizer
  column_mapping:
    text_column: messages
    prompt_text_column: ask
    rejected_text_column: worse

params:
  block_size: 1024
  model_max_length: 8192
  max_prompt_length: 512
  max_completion_length: 256
  epochs: 3
  batch_size: 1
  lr: 3e-5
  peft: true
  quantization: int8
  target_modules: q_proj,v_proj
  padding: left
  optimizer: paged_adamw_8bit
  scheduler: cosine
  gradient_accumulation: 8
  mixed_precision: fp16
  merge_adapter: true
  lora_dropout: 0
  eval_strategy: no
  distributed_backend: null

hub:
  username: ${PX_USER}
  token: ${PX_TOKEN}
  push_to_hub: true
"""


def test_all_sections_of_autotrains_form_are_read(read_config: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_USER", "me")
    monkeypatch.setenv("PX_TOKEN", "hf_secret")
    run = read_config(FULL)
    expected = {
        "trainer": "sft",
        "model": "org/base",
        "project_name": "autotrain-run",
        "log": "tensorboard",
        "data_path": "org/chat",
        "train_split": "test",
        "valid_split": "held-out",
        "chat_template": "tokenizer",
        "text_column": "messages",
        "prompt_text_column": "ask",
        "rejected_text_column": "worse",
        "block_size": 1024,
        "model_max_length": 8192,
        "max_prompt_length": 512,
        "max_completion_length": 256,
        "epochs": 3,
        "batch_size": 1,
        "lr": 3e-5,
        "peft": True,
        "quantization": "int8",
        "target_modules": "q_proj,v_proj",
        "padding": "left",
        "optimizer": "paged_adamw_8bit",
        "scheduler": "cosine",
        "gradient_accumulation": 8,
        "mixed_precision": "fp16",
        "merge_adapter": True,
        "lora_dropout": 0.0,
        "eval_strategy": "no",
        "distributed_backend": "auto",
        "username": "me",
        "token": "hf_secret",
        "push_to_hub": True,
    }
    assert {name: getattr(run.train, name) for name in expected} == expected
    # A note names each key that has no effect.
    idle = ["rejected_text_column", "max_prompt_length", "max_completion_length"]
    assert sorted(note.split(":")[0] for note in run.settings.notes) == sorted(idle)


# The shapes of the configs in AutoTrain's configs/llm_finetuning.
SHAPES = {
    "full fine-tuning": sft("block_size: 1024", "max_prompt_length: 512", "mixed_precision: fp16"),
    "lora without quantisation": sft("peft: true", "quantization: null", "optimizer: paged_adamw_8bit"),
    "qlora and merge": sft(
        "peft: true", "quantization: int4", "merge_adapter: true", "mixed_precision: bf16"
    ),
    "unsloth": sft("peft: true", "quantization: int4", "unsloth: true", "lora_dropout: 0"),
    "hub off": sft() + "hub:\n  username: ${PX_NONE}\n  token: ${PX_NONE}\n  push_to_hub: false\n",
    "no valid split": sft().replace("path: data", "path: a/b\n  valid_split: null\n  chat_template: null"),
    "columns without the suffix": sft().replace(
        "path: data", "path: a/b\n  column_mapping:\n    text: messages"
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_configs_shaped_like_autotrains_examples_are_read(read_config: Read, shape: str) -> None:
    assert read_config(SHAPES[shape]).train.trainer == "sft"


@pytest.mark.parametrize("name", ["dpo", "orpo", "reward"])
def test_configs_of_preference_trainers_are_read(read_config: Read, name: str) -> None:
    columns = ("text_column: chosen", "rejected_text_column: rejected", "prompt_text_column: prompt")
    mapping = "\n    ".join(("\n  column_mapping:", *columns))
    text = sft("max_prompt_length: 512", "block_size: [1024, 512]").replace("llm-sft", f"llm-{name}")
    if name == "reward":  # it has no maximum prompt length
        text = text.replace("[1024, 512]", "1024")
    train = read_config(text.replace("path: data", f"path: a/b{mapping}")).train
    assert (train.trainer, train.text_column, train.prompt_text_column) == (name, "chosen", "prompt")
    assert (train.sequence_length, train.max_prompt_length) == (1024, 512)


@pytest.mark.parametrize("task", [*TASKS, "llm:sft", "llm:dpo"])
def test_every_spelling_of_the_task_sets_the_trainer(read_config: Read, task: str) -> None:
    trainer = {"llm-generic": "default"}.get(task, task[4:] if task[3:4] in ("-", ":") else "default")
    assert read_config(sft().replace("llm-sft", task)).train.trainer == trainer


def test_task_llm_takes_the_trainer_from_params(read_config: Read) -> None:
    for task in ("llm", "lm_training"):
        assert read_config(sft("trainer: sft").replace("llm-sft", task)).train.trainer == "sft"


def test_variables_are_replaced_in_every_string(read_config: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_A", "left")
    monkeypatch.setenv("PX_B", "right")
    monkeypatch.setenv("PX_LR", "0.5")
    run = read_config(sft("run_name: ${PX_A}-${PX_B}", "lr: ${PX_LR}"))
    assert run.train.run_name == "left-right"
    assert run.train.lr == 0.5
    assert run.settings.sources["run_name"] == "c.yaml:5 (${PX_A}, ${PX_B})"


def test_variables_are_replaced_in_launch_and_slurm(
    read_config: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PX_N", "2")
    run = read_config(sft() + "launch:\n  num_processes: ${PX_N}\nslurm:\n  account: team${PX_N}\n")
    assert (run.launch.num_processes, run.slurm.account) == (2, "team2")


def test_an_unset_hub_variable_is_null(read_config: Read) -> None:
    run = read_config(sft() + "hub:\n  username: ${PX_NONE}\n  token: ${PX_NONE}\n")
    assert (run.train.username, run.train.token) == (None, None)
    assert run.settings.sources["username"] == "c.yaml:7 (${PX_NONE}, not set)"


@pytest.mark.parametrize(
    "text",
    [
        sft(),
        sft("peft: true", "quantization: int4", "unsloth: true"),
        sft("block_size: [512, 256]", "valid_split: v", "save_steps: 5", "resume: true").replace(
            "llm-sft", "llm-dpo"
        ),
        sft("lr: 3e-5", "warmup_steps: 3", "distributed_backend: fsdp", "target_modules: null"),
    ],
)
def test_the_effective_config_resolves_to_itself(read_config: Read, work: Path, text: str) -> None:
    first = read_config(text)
    (work / "effective.json").write_text(effective_text(first.settings))
    second = load_settings(work / "effective.json")
    assert second == first.settings
    again = load_run(work / "effective.json", {})
    assert again.settings == first.settings
    (work / "twice.json").write_text(effective_text(second))
    assert (work / "twice.json").read_bytes() == (work / "effective.json").read_bytes()


def test_the_fields_that_the_user_set_survive_the_round_trip(read_config: Read, work: Path) -> None:
    run = read_config(sft("text_column: body", "max_prompt_length: 100"))
    (work / "effective.json").write_text(effective_text(run.settings))
    chosen = load_settings(work / "effective.json").train.model_fields_set
    assert {"text_column", "max_prompt_length"} <= chosen
    assert "prompt_text_column" not in chosen
