"""Settings: other names of fields, values that are derived, and secrets, which are not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configs import Read, sft
from fakes import run_command

from trainers.config.errors import ConfigError
from trainers.config.file import effective_text
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig
from trainers.config.settings import resolve
from trainers.config.values import Value


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_its_field(read_config: Read, alias: str) -> None:
    name = ALIASES[alias]
    values = {"optim": "sgd", "scheduler": "cosine", "eval_strategy": "no", "log": "wandb", "resume": True}
    value: Any = values.get(name, values.get(alias, "word"))
    kind = TrainConfig.model_fields[name].annotation
    value = 3 if kind in (int, float) or name == "block_size" else True if kind is bool else value
    assert getattr(read_config(sft(f"{alias}: {json.dumps(value)}")).train, name) == value


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_a_switch_sets_its_field(read_config: Read, name: str, value: bool) -> None:
    field, on, off = SWITCHES[name]
    run = read_config(sft(f"{name}: {json.dumps(value)}"))
    assert getattr(run.train, field) == (on if value else off)
    assert run.settings.sources[field] == "c.yaml:5"


ON = ["disable_gradient_checkpointing: false", "gradient_checkpointing: true"]
OFF = ["disable_gradient_checkpointing: true", "gradient_checkpointing: false"]


@pytest.mark.parametrize("choice", ["full", "selective", "offload", "true", "none", "false"])
@pytest.mark.parametrize("switch", [*ON, *OFF])
@pytest.mark.parametrize("first", [True, False])
def test_a_switch_that_is_on_allows_every_choice_except_none(
    read_config: Read, choice: str, switch: str, first: bool
) -> None:
    """AutoTrain's configs contain its default, disable_gradient_checkpointing: false."""
    lines = [f"activation_checkpointing: {choice}", switch]
    text = sft(*(lines if first else reversed(lines)))
    if (choice in ("none", "false")) != (switch in OFF):
        with pytest.raises(ConfigError, match=r"c.yaml:6: .* contradicts .* \(c.yaml:5\); both set"):
            read_config(text)
        return
    run = read_config(text)
    assert run.train.activation_checkpointing == {"true": "full", "false": "none"}.get(choice, choice)
    assert run.settings.sources["activation_checkpointing"] == f"c.yaml:{5 if first else 6}"


def test_two_spellings_with_the_same_value_are_allowed(read_config: Read) -> None:
    assert read_config(sft("lr: 0.1", "learning_rate: 0.1")).train.lr == 0.1


def test_default_int4_is_not_used_without_peft(read_config: Read) -> None:
    run = read_config(sft())
    assert run.train.quantization is None
    assert run.settings.sources["quantization"].startswith("derived: AutoTrain's default int4")
    assert any("int4" in note for note in run.settings.notes)


def test_default_int4_is_used_with_peft(read_config: Read) -> None:
    run = read_config(sft("peft: true"))
    assert run.train.quantization == "int4"
    assert not any("int4" in note for note in run.settings.notes)


def test_merge_adapter_without_peft_has_no_effect_and_a_note(work):
    """AutoTrain ignores it silently, and one of its example configs sets it."""
    settings = resolve({"trainer": Value("sft", "f:1", "task"), "merge_adapter": Value(True, "f:2", "x")})
    assert settings.train.merge_adapter is False
    assert any(note.startswith("merge_adapter: has no effect") for note in settings.notes)


@pytest.mark.parametrize(
    ("limit", "size", "noted"), [(2048, 1024, True), (1024, 1024, False), (512, 512, False)]
)
def test_block_size_minus_one_is_derived_from_model_max_length(
    read_config: Read, limit: int, size: int, noted: bool
) -> None:
    run = read_config(sft(f"model_max_length: {limit}"))
    assert run.train.block_size == size
    assert run.settings.sources["block_size"].startswith("derived: ")
    assert any("block_size" in note for note in run.settings.notes) is noted


def test_the_default_prompt_length_allows_a_short_block_size(read_config: Read) -> None:
    assert read_config(sft("block_size: 64")).train.block_size == 64


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
    read_config: Read, params: list[str], save: str, evaluate: str, best: bool
) -> None:
    train = read_config(sft(*params)).train
    assert (train.save_strategy, train.eval_strategy, train.load_best_model_at_end) == (save, evaluate, best)


def test_derived_values_follow_the_values_of_the_user(read_config: Read) -> None:
    train = read_config(sft("batch_size: 7", "project_name: runs/mine").replace("seed: 42", "seed: 9")).train
    assert (train.per_device_eval_batch_size, train.data_seed, train.run_name) == (7, 9, "mine")
    chosen = read_config(sft("per_device_eval_batch_size: 3", "data_seed: 4", "run_name: other")).train
    assert (chosen.per_device_eval_batch_size, chosen.data_seed, chosen.run_name) == (3, 4, "other")


def test_a_wandb_run_is_named_by_the_config_else_the_environment_else_the_folder(read_config, monkeypatch):
    text = sft("log: wandb")
    assert read_config(text).train.run_name == "project-name"
    monkeypatch.setenv("WANDB_NAME", "shell-name")
    assert read_config(text).train.run_name == "shell-name"
    assert read_config(sft("log: wandb", "run_name: mine")).train.run_name == "mine"
    assert read_config(sft()).train.run_name == "project-name", "other trackers do not read it"


def test_an_empty_config_resolves() -> None:
    settings = resolve({})
    assert (settings.train.trainer, settings.train.packed) == ("default", "wrapped")


SECRET = "hf_do_not_print_me"


@pytest.mark.parametrize("how", ["file", "variable", "environment"])
def test_a_secret_is_never_printed_or_written(
    read_config: Read, how: str, work: Path, hardware: object, packages: object,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv({"variable": "PX_TOKEN", "environment": "HF_TOKEN"}.get(how, "PX_OTHER"), SECRET)
    hub = {
        "file": f"hub:\n  token: {SECRET}\n",
        "variable": "hub:\n  token: ${PX_TOKEN}\n",
        "environment": "",
    }[how]
    text = sft("project_name: run", "model: model") + hub
    run = read_config(text)
    assert run.train.token == SECRET
    assert "token" not in run.settings.public()
    assert SECRET not in repr(run.train)
    (work / "effective.json").write_text(effective_text(run.settings))
    assert SECRET not in (work / "effective.json").read_text()
    assert run_command(["show", "c.yaml"], monkeypatch) == 0
    assert run_command(["show", "c.yaml", "--json"], monkeypatch) == 0
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
