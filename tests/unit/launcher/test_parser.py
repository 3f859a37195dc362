"""Flags: every spelling of a flag sets its field, and --help describes every field once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import run_command, show, write_rows

from launcher.config import LaunchConfig
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig


def values(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the effective values, without their sources."""
    return {name: entry["value"] for name, entry in plan["config"].items()}


@pytest.mark.parametrize("command", ["train", "show", "llm"])
def test_help_of_a_command_describes_every_field_once(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert run_command([command, "--help"], monkeypatch) == 0
    out = capsys.readouterr().out
    for name, field in {**TrainConfig.model_fields, **LaunchConfig.model_fields}.items():
        assert f"--{name.replace('_', '-')}" in out
        assert (field.description or "").rstrip(".") in out
    for hidden in (*ALIASES, *SWITCHES):
        assert f" --{hidden.replace('_', '-')} " not in out


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        *((f"--{name}", name) for name in ("batch_size", "gradient_accumulation", "max_steps")),
        *(
            (f"--{name.replace('_', '-')}", name)
            for name in ("batch_size", "gradient_accumulation", "max_steps")
        ),
        ("--per-device-train-batch-size", "batch_size"),
        ("--per_device_train_batch_size", "batch_size"),
        ("--gradient_accumulation_steps", "gradient_accumulation"),
    ],
)
@pytest.mark.parametrize("form", ["{} 7", "{}=7"])
def test_every_spelling_of_a_flag_sets_its_field(
    config: Path,
    flag: str,
    name: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = show(["c.yaml", *form.format(flag).split()], monkeypatch, capsys)
    assert plan["config"][name]["value"] == 7
    assert plan["config"][name]["source"].startswith("flag --")


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "false"], "overwrite", False),
        (["--gradient-checkpointing", "false"], "activation_checkpointing", "none"),
        (["--gradient-checkpointing"], "activation_checkpointing", "full"),
        (["--disable_gradient_checkpointing"], "activation_checkpointing", "none"),
        (["--activation-checkpointing", "selective"], "activation_checkpointing", "selective"),
        (["--load-best-model-at-end", "false"], "load_best_model_at_end", False),
        (["--logging-steps", "-1"], "logging_steps", -1),
        (["--lr", "3e-5"], "lr", 3e-5),
        (["--valid-split", "none"], "valid_split", None),
        (["--mixed-precision", "none"], "mixed_precision", None),
    ],
)
def test_a_flag_sets_its_value(
    config: Path, flags: list[str], name: str, value: object,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert values(show(["c.yaml", *flags], monkeypatch, capsys))[name] == value


def test_block_size_takes_a_list(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(config.parent / "data" / "train.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})
    config.write_text(config.read_text().replace("llm-sft", "llm-dpo"))
    found = values(show(["c.yaml", "--block-size", "512,256"], monkeypatch, capsys))
    assert (found["block_size"], found["max_prompt_length"]) == ([512, 256], 256)


def test_a_flag_may_come_before_the_config(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert values(show(["--seed", "7", "c.yaml"], monkeypatch, capsys))["seed"] == 7
