"""The config: AutoTrain's configs keep their meaning, each value has a source, secrets are not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import run_command

from launcher.commands.schema import json_schema
from launcher.config import LaunchConfig, Run, SlurmConfig, load_run
from trainers.config.errors import ConfigError
from trainers.config.file import load_settings, write_effective
from trainers.config.names import ALIASES, SWITCHES, TASKS
from trainers.config.schema import TrainConfig
from trainers.config.settings import Value, resolve

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

Read = Callable[..., Run]


@pytest.fixture
def read(work: Path) -> Read:
    """`read(text, **flags)` resolves the text of a config file, with flags."""

    def load(text: str, **flags: str) -> Run:
        (work / "c.yaml").write_text(text)
        return load_run(Path("c.yaml"), flags)

    return load


def sft(*params: str) -> str:
    """Return a short config. Its parameters start in line 5."""
    return "task: llm-sft\ndata:\n  path: data\nparams:\n" + "".join(
        f"  {p}\n" for p in (*params, "seed: 42")
    )


def test_every_parameter_of_autotrain_has_its_default() -> None:
    config = TrainConfig()
    assert {name: getattr(config, name) for name in AUTOTRAIN_DEFAULTS} == AUTOTRAIN_DEFAULTS
    assert config.activation_checkpointing == "full"  # disable_gradient_checkpointing: false
    assert config.distributed_backend == "auto"
    assert TrainConfig(distributed_backend=None).distributed_backend == "auto"


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


def test_all_sections_of_autotrains_form_are_read(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_USER", "me")
    monkeypatch.setenv("PX_TOKEN", "hf_secret")
    run = read(FULL)
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
def test_configs_shaped_like_autotrains_examples_are_read(read: Read, shape: str) -> None:
    assert read(SHAPES[shape]).train.trainer == "sft"


@pytest.mark.parametrize("name", ["dpo", "orpo", "reward"])
def test_configs_of_preference_trainers_are_read(read: Read, name: str) -> None:
    columns = ("text_column: chosen", "rejected_text_column: rejected", "prompt_text_column: prompt")
    mapping = "\n    ".join(("\n  column_mapping:", *columns))
    text = sft("max_prompt_length: 512", "block_size: [1024, 512]").replace("llm-sft", f"llm-{name}")
    if name == "reward":  # it has no maximum prompt length
        text = text.replace("[1024, 512]", "1024")
    train = read(text.replace("path: data", f"path: a/b{mapping}")).train
    assert (train.trainer, train.text_column, train.prompt_text_column) == (name, "chosen", "prompt")
    assert (train.sequence_length, train.max_prompt_length) == (1024, 512)


@pytest.mark.parametrize("task", [*TASKS, "llm:sft", "llm:dpo"])
def test_every_spelling_of_the_task_sets_the_trainer(read: Read, task: str) -> None:
    trainer = {"llm-generic": "default"}.get(task, task[4:] if task[3:4] in ("-", ":") else "default")
    assert read(sft().replace("llm-sft", task)).train.trainer == trainer


def test_task_llm_takes_the_trainer_from_params(read: Read) -> None:
    for task in ("llm", "lm_training"):
        assert read(sft("trainer: sft").replace("llm-sft", task)).train.trainer == "sft"


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_its_field(read: Read, alias: str) -> None:
    name = ALIASES[alias]
    values = {"optim": "sgd", "scheduler": "cosine", "eval_strategy": "no", "log": "wandb", "resume": True}
    value: Any = values.get(name, values.get(alias, "word"))
    kind = TrainConfig.model_fields[name].annotation
    value = 3 if kind in (int, float) or name == "block_size" else True if kind is bool else value
    assert getattr(read(sft(f"{alias}: {json.dumps(value)}")).train, name) == value


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_a_switch_sets_its_field(read: Read, name: str, value: bool) -> None:
    field, on, off = SWITCHES[name]
    run = read(sft(f"{name}: {json.dumps(value)}"))
    assert getattr(run.train, field) == (on if value else off)
    assert run.settings.sources[field] == "c.yaml:5"


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "full"), ("false", "none"), ("no", "none"), ("selective", "selective")]
)
def test_activation_checkpointing_accepts_the_spelling_of_transformers(
    read: Read, written: str, meant: str
) -> None:
    assert read(sft(f"activation_checkpointing: {written}")).train.activation_checkpointing == meant
    assert read(sft(), activation_checkpointing=written).train.activation_checkpointing == meant


ON = ["disable_gradient_checkpointing: false", "gradient_checkpointing: true"]
OFF = ["disable_gradient_checkpointing: true", "gradient_checkpointing: false"]


@pytest.mark.parametrize("choice", ["full", "selective", "offload", "true", "none", "false"])
@pytest.mark.parametrize("switch", [*ON, *OFF])
@pytest.mark.parametrize("first", [True, False])
def test_a_switch_that_is_on_allows_every_choice_except_none(
    read: Read, choice: str, switch: str, first: bool
) -> None:
    """AutoTrain's configs contain its default, disable_gradient_checkpointing: false."""
    lines = [f"activation_checkpointing: {choice}", switch]
    text = sft(*(lines if first else reversed(lines)))
    if (choice in ("none", "false")) != (switch in OFF):
        with pytest.raises(ConfigError, match=r"c.yaml:6: .* contradicts .* \(c.yaml:5\); both set"):
            read(text)
        return
    run = read(text)
    assert run.train.activation_checkpointing == {"true": "full", "false": "none"}.get(choice, choice)
    assert run.settings.sources["activation_checkpointing"] == f"c.yaml:{5 if first else 6}"


def test_two_spellings_with_the_same_value_are_allowed(read: Read) -> None:
    assert read(sft("lr: 0.1", "learning_rate: 0.1")).train.lr == 0.1


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr: 3e-5", "lr", 3e-5),  # a string for PyYAML
        ("lr: 1", "lr", 1.0),
        ("epochs: 0.5", "epochs", 0.5),
        ("eval_strategy: no", "eval_strategy", "no"),  # false for PyYAML
        ("save_strategy: no", "save_strategy", "no"),
        ("mixed_precision: none", "mixed_precision", None),
        ("mixed_precision: null", "mixed_precision", None),
        ("quantization: none", "quantization", None),
        ("block_size: '512'", "block_size", 512),
        ("peft: yes", "peft", True),
        ("resume: true", "resume", True),
        ("resume: run/checkpoint-3", "resume", "run/checkpoint-3"),
        ("weight_decay: 1e-2", "weight_decay", 0.01),
    ],
)
def test_yaml_values_are_converted(read: Read, line: str, name: str, value: object) -> None:
    params = [line, "peft: true"] if line.startswith("quantization") else [line]
    assert getattr(read(sft(*params)).train, name) == value


@pytest.mark.parametrize("line", ["block_size: 512,256", "block_size: [512, 256]"])
def test_block_size_may_be_a_list(read: Read, line: str) -> None:
    config = read(sft(line).replace("llm-sft", "llm-dpo")).train
    assert (config.block_size, config.sequence_length, config.max_prompt_length) == ([512, 256], 512, 256)


def test_each_value_has_a_source(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_DATA", "rows")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = read(
        sft("lr: 0.1").replace("path: data", "path: ${PX_DATA}"), learning_rate="0.2", num_processes="2"
    )
    sources = run.settings.sources
    assert run.train.lr == 0.2, "flags override the file"
    assert sources["lr"] == "flag --learning-rate"
    assert sources["trainer"] == "c.yaml:1"
    assert sources["seed"] == "c.yaml:6"
    assert sources["data_path"] == "c.yaml:3 (${PX_DATA})"
    assert sources["token"] == "environment HF_TOKEN"
    assert sources["weight_decay"] == "default"
    assert sources["data_seed"] == "derived: seed"
    assert set(sources) == set(TrainConfig.model_fields)
    assert run.launch_sources["num_processes"] == "flag --num-processes"
    assert run.launch_sources["offload"] == "default"


def test_the_sections_launch_and_slurm_are_read(read: Read) -> None:
    run = read(sft() + "launch:\n  num_processes: 4\n  zero_stage: 2\nslurm:\n  nodes: 2\n", zero_stage="3")
    assert (run.launch.num_processes, run.launch.zero_stage, run.slurm.nodes) == (4, 3, 2)
    assert run.launch_sources["num_processes"] == "c.yaml:7"
    assert run.launch_sources["zero_stage"] == "flag --zero-stage"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model", "model"),
        ("data.path", "data_path"),
        ("data.train_split", "train_split"),
        ("data.column_mapping.text_column", "text_column"),
        ("project_name", "project_name"),
        ("quantization", "quantization"),
    ],
)
def test_a_message_has_the_source_of_its_key(read: Read, key: str, name: str) -> None:
    run = read(sft(), **{name: "int4" if name == "quantization" else "x", "peft": "true"})
    assert run.source_of(key) == f"flag --{name.replace('_', '-')}"
    assert run.source_of("launch.num_processes") == "default"
    assert run.source_of("data/train.jsonl:2") == ""


def test_a_flag_overrides_a_key_with_another_name(read: Read) -> None:
    assert read(sft("learning_rate: 0.1"), lr="0.2").train.lr == 0.2
    given = read(sft("gradient_checkpointing: true"), disable_gradient_checkpointing="true").train
    assert given.activation_checkpointing == "none"


def test_default_int4_is_not_used_without_peft(read: Read) -> None:
    run = read(sft())
    assert run.train.quantization is None
    assert run.settings.sources["quantization"].startswith("derived: AutoTrain's default int4")
    assert any("int4" in note for note in run.settings.notes)


def test_default_int4_is_used_with_peft(read: Read) -> None:
    run = read(sft("peft: true"))
    assert run.train.quantization == "int4"
    assert not any("int4" in note for note in run.settings.notes)


@pytest.mark.parametrize(
    ("limit", "size", "noted"), [(2048, 1024, True), (1024, 1024, False), (512, 512, False)]
)
def test_block_size_minus_one_is_derived_from_model_max_length(
    read: Read, limit: int, size: int, noted: bool
) -> None:
    run = read(sft(f"model_max_length: {limit}"))
    assert run.train.block_size == size
    assert run.settings.sources["block_size"].startswith("derived: ")
    assert any("block_size" in note for note in run.settings.notes) is noted


def test_the_default_prompt_length_allows_a_short_block_size(read: Read) -> None:
    assert read(sft("block_size: 64")).train.block_size == 64


@pytest.mark.parametrize(
    ("params", "save", "evaluate", "best"),
    [
        ([], "epoch", "no", False),
        (["save_steps: 5"], "steps", "no", False),
        (["valid_split: v"], "epoch", "epoch", True),
        (["valid_split: v", "save_steps: 5"], "steps", "epoch", False),
        (["valid_split: v", "eval_strategy: steps", "save_steps: 5", "eval_steps: 5"],
         "steps", "steps", True),
        (["valid_split: v", "eval_strategy: steps", "save_steps: 5", "eval_steps: 2"],
         "steps", "steps", False),
        (["valid_split: v", "load_best_model_at_end: false"], "epoch", "epoch", False),
        (["save_strategy: no"], "no", "no", False),
    ],
)  # fmt: skip
def test_the_strategies_of_saving_and_evaluation_are_derived(
    read: Read, params: list[str], save: str, evaluate: str, best: bool
) -> None:
    train = read(sft(*params)).train
    assert (train.save_strategy, train.eval_strategy, train.load_best_model_at_end) == (save, evaluate, best)


def test_derived_values_follow_the_values_of_the_user(read: Read) -> None:
    train = read(sft("batch_size: 7", "project_name: runs/mine").replace("seed: 42", "seed: 9")).train
    assert (train.per_device_eval_batch_size, train.data_seed, train.run_name) == (7, 9, "mine")
    chosen = read(sft("per_device_eval_batch_size: 3", "data_seed: 4", "run_name: other")).train
    assert (chosen.per_device_eval_batch_size, chosen.data_seed, chosen.run_name) == (3, 4, "other")


def test_unsloth_has_a_note(read: Read) -> None:
    assert any(
        note.startswith("unsloth: has no effect, since its kernels and its loader")
        for note in read(sft("unsloth: true")).settings.notes
    )


def test_variables_are_replaced_in_every_string(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_A", "left")
    monkeypatch.setenv("PX_B", "right")
    monkeypatch.setenv("PX_LR", "0.5")
    run = read(sft("run_name: ${PX_A}-${PX_B}", "lr: ${PX_LR}"))
    assert run.train.run_name == "left-right"
    assert run.train.lr == 0.5
    assert run.settings.sources["run_name"] == "c.yaml:5 (${PX_A}, ${PX_B})"


def test_variables_are_replaced_in_launch_and_slurm(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_N", "2")
    run = read(sft() + "launch:\n  num_processes: ${PX_N}\nslurm:\n  account: team${PX_N}\n")
    assert (run.launch.num_processes, run.slurm.account) == (2, "team2")


def test_an_unset_hub_variable_is_null(read: Read) -> None:
    run = read(sft() + "hub:\n  username: ${PX_NONE}\n  token: ${PX_NONE}\n")
    assert (run.train.username, run.train.token) == (None, None)
    assert run.settings.sources["username"] == "c.yaml:7 (${PX_NONE}, not set)"


SECRET = "hf_do_not_print_me"


@pytest.mark.parametrize("how", ["file", "variable", "environment"])
def test_a_secret_is_never_printed_or_written(
    read: Read, how: str, work: Path, hardware: object, packages: object,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv({"variable": "PX_TOKEN", "environment": "HF_TOKEN"}.get(how, "PX_OTHER"), SECRET)
    hub = {
        "file": f"hub:\n  token: {SECRET}\n",
        "variable": "hub:\n  token: ${PX_TOKEN}\n",
        "environment": "",
    }[how]
    text = sft("project_name: run", "model: model") + hub
    run = read(text)
    assert run.train.token == SECRET
    assert "token" not in run.settings.public()
    assert SECRET not in repr(run.train)
    write_effective(run.settings, work / "effective.json")
    assert SECRET not in (work / "effective.json").read_text()
    assert run_command(["show", "c.yaml"], monkeypatch) == 0
    assert run_command(["show", "c.yaml", "--json"], monkeypatch) == 0
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err


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
def test_the_effective_config_resolves_to_itself(read: Read, work: Path, text: str) -> None:
    first = read(text)
    write_effective(first.settings, work / "effective.json")
    second = load_settings(work / "effective.json")
    assert second == first.settings
    again = load_run(work / "effective.json", {})
    assert again.settings == first.settings
    write_effective(second, work / "twice.json")
    assert (work / "twice.json").read_bytes() == (work / "effective.json").read_bytes()


def test_the_fields_that_the_user_set_survive_the_round_trip(read: Read, work: Path) -> None:
    run = read(sft("text_column: body", "max_prompt_length: 100"))
    write_effective(run.settings, work / "effective.json")
    chosen = load_settings(work / "effective.json").train.model_fields_set
    assert {"text_column", "max_prompt_length"} <= chosen
    assert "prompt_text_column" not in chosen


def test_an_empty_config_resolves() -> None:
    settings = resolve({})
    assert (settings.train.trainer, settings.train.packed) == ("default", "wrapped")


def test_the_json_schema_has_every_key_and_no_dangling_reference() -> None:
    schema = json_schema()
    kinds = {"object", "array", "string", "integer", "number", "boolean", "null"}
    definitions = schema["$defs"]

    def walk(node: object) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        elif isinstance(node, dict):
            assert node.get("type", "object") in kinds or isinstance(node["type"], dict)  # a field named type
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in definitions
            for item in node.values():
                walk(item)

    walk(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert set(definitions["Params"]["properties"]) == {*TrainConfig.model_fields, *ALIASES, *SWITCHES}
    assert set(definitions["LaunchConfig"]["properties"]) == set(LaunchConfig.model_fields)
    assert set(definitions["SlurmConfig"]["properties"]) == set(SlurmConfig.model_fields)
    assert set(definitions["Hub"]["properties"]) == {"username", "token", "push_to_hub"}
    assert schema["required"] == ["task", "data"]
    for section in (schema, *definitions.values()):
        assert section["additionalProperties"] is False


@pytest.mark.parametrize("model", [TrainConfig, LaunchConfig, SlurmConfig])
def test_every_field_has_a_description(model: type[Any]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_merge_adapter_without_peft_has_no_effect_and_a_note(work):
    """AutoTrain ignores it silently, and one of its example configs sets it."""
    settings = resolve({"trainer": Value("sft", "f:1", "task"), "merge_adapter": Value(True, "f:2", "x")})
    assert settings.train.merge_adapter is False
    assert any(note.startswith("merge_adapter: has no effect") for note in settings.notes)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("dpo_beta", 0.2, "it belongs to dpo"),
        ("lora_r", 8, "peft is off"),
        ("eval_steps", 5, "no valid_split"),
        ("save_steps", 5, "save_strategy is not steps"),
        ("epochs", 2, "max_steps is set"),
        ("warmup_ratio", 0.2, "warmup_steps is set"),
    ],
)
def test_a_parameter_without_effect_has_a_note(name, value, why):
    others = {"trainer": "sft", "save_strategy": "epoch", "max_steps": 4, "warmup_steps": 1, name: value}
    settings = resolve({key: Value(entry, "f:1", key) for key, entry in others.items()})
    assert f"{name}: has no effect" in "\n".join(settings.notes)
    assert why in next(note for note in settings.notes if note.startswith(name))


@pytest.mark.parametrize(("minutes", "idle"), [(None, True), (30, False)])
def test_save_total_limit_has_an_effect_with_save_minutes(minutes, idle):
    values = {"trainer": "sft", "save_strategy": "no", "save_total_limit": 3, "save_minutes": minutes}
    settings = resolve({key: Value(entry, "f:1", key) for key, entry in values.items()})
    assert any(note.startswith("save_total_limit: has no effect") for note in settings.notes) == idle


def test_a_wandb_run_is_named_by_the_config_else_the_environment_else_the_folder(read, monkeypatch):
    text = sft("log: wandb")
    assert read(text).train.run_name == "project-name"
    monkeypatch.setenv("WANDB_NAME", "shell-name")
    assert read(text).train.run_name == "shell-name"
    assert read(sft("log: wandb", "run_name: mine")).train.run_name == "mine"
    assert read(sft()).train.run_name == "project-name", "other trackers do not read it"
