"""The flags: one for each config field, in the sections of the documentation, with its choices.

Every spelling sets its field, also before the config.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from fakes import run_command, show, write_rows
from places import REPO
from pydantic import Field

from launcher.config import LaunchConfig, SlurmConfig
from launcher.parser import Parser, add_config_flags, values_of
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig, sections

FIELDS = {**TrainConfig.model_fields, **LaunchConfig.model_fields, **SlurmConfig.model_fields}


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="phalanx", add_help=False, allow_abbrev=False)
    add_config_flags(made, slurm=True)
    return made


def test_no_two_sections_have_a_field_of_the_same_name() -> None:
    counts = [len(model.model_fields) for model in (TrainConfig, LaunchConfig, SlurmConfig)]
    assert len(FIELDS) == sum(counts)


def test_help_shows_each_field_once_in_the_order_of_the_schema(
    parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    options = parser.format_help().partition("\nRun:\n")[2]
    shown = re.findall(r"^ +(--\S+)", options, re.M)
    assert shown == [f"--{name.replace('_', '-')}" for name in FIELDS]


def test_the_sections_of_help_are_those_of_the_documentation_in_its_order(parser: Parser) -> None:
    titles = re.findall(r"^(\w[\w -]*):$", parser.format_help(), re.M)
    page = (REPO / "docs" / "config.md").read_text()
    documented = re.findall(r"^(?:### (.+)|## `(.+)`)$", page, re.M)
    wanted = [title or section for title, section in documented]
    assert [title.lower() for title in titles if title != "options"] == [title.lower() for title in wanted]


def test_each_section_of_help_has_its_fields(parser: Parser) -> None:
    found = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    for title, names in sections():
        assert found[title] - set(ALIASES) == set(names)


@pytest.mark.parametrize("dash", ["-", "_"])
def test_each_name_of_a_field_is_a_flag_in_both_spellings(parser: Parser, dash: str) -> None:
    for name in (*FIELDS, *ALIASES, *SWITCHES):
        found = parser.parse_args([f"--{name.replace('_', dash)}", "7"])
        assert vars(found) == {name: "7"}


def test_the_flags_of_slurm_are_only_added_on_request() -> None:
    made = argparse.ArgumentParser(add_help=False)
    add_config_flags(made)
    assert not {action.dest for action in made._actions} & set(SlurmConfig.model_fields)


def test_only_the_flags_that_were_given_are_returned(parser: Parser) -> None:
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--lr", "1", "--peft"])) == {"lr": "1", "peft": "true"}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, ["N"]),
        (float, ["X"]),
        (str, ["TEXT"]),
        (bool, ["true|false"]),
        (Literal["a", "b"], ["a", "b"]),
        (Literal["a", "b"] | None, ["a", "b", "none"]),
        (int | None, ["N"]),  # the description says what its default means
        (bool | None, ["true|false", "none"]),
        (bool | str, ["true|false", "TEXT"]),
        (str | list[str] | None, ["TEXT", "TEXT,..."]),
        (str | None, ["TEXT"]),
        (Annotated[int, Field(gt=0)] | list[Annotated[int, Field(gt=0)]], ["N", "N,..."]),
        (Annotated[Literal["a"] | None, Field()], ["a", "none"]),
        (int | float | int, ["N", "X"]),
    ],
    ids=str,
)
def test_values_of_a_type_are_its_choices_or_its_kind(annotation: Any, words: list[str]) -> None:
    assert list(values_of(annotation)) == words


@pytest.mark.parametrize("name", FIELDS)
def test_help_offers_none_only_where_it_can_be_given(parser: Parser, name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    action: Any = next(action for action in parser._actions if flag in action.option_strings)
    if "none" not in action.completer(prefix=""):
        return
    model = next(m for m in (TrainConfig, LaunchConfig, SlurmConfig) if name in m.model_fields)
    assert getattr(model.model_validate({name: "none"}), name) in (None, "none")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--packing", "auto|bfd|wrapped|none"),
        ("--mixed-precision", "fp16|bf16|none"),
        ("--distributed-backend", "auto|ddp|fsdp|deepspeed|none"),
        ("--peft", "[true|false]"),
        ("--sharding", "full_shard|shard_grad_op|hybrid_shard"),
        ("--save-strategy", "no|steps|epoch"),
        ("--eval-packing", "[true|false]"),
        ("--resume", "[true|false|TEXT]"),
        ("--block-size", "N|N,..."),
        ("--lr", "X"),
        ("--model", "TEXT"),
    ],
)
def test_help_names_the_choices_of_a_flag(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, flag: str, words: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert re.search(rf"^ +{flag} {re.escape(words)}( |$)", parser.format_help(), re.M)


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--lr", "(default: 3e-05)"),
        ("--peft", "(default: false)"),
        ("--max-grad-norm", "0: no clipping. (default: 1.0)"),
        ("--valid-fraction", "(default: 0.0)"),
        ("--model-ref", "Default: the base model before training."),  # None: the description says it
    ],
)
def test_help_ends_with_the_default(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, flag: str, default: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    lines = parser.format_help().splitlines()
    assert next(line for line in lines if line.split()[:1] == [flag]).endswith(default)


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("--packing", ["auto", "bfd", "wrapped", "none"]),
        ("--peft", ["true", "false"]),
        ("--resume", ["true", "false"]),
        ("--lr", []),
        ("--model", []),
        ("--block-size", []),
        ("--target-modules", []),
    ],
)
def test_a_shell_is_offered_only_choices_that_can_be_given(
    parser: Parser, flag: str, choices: list[str]
) -> None:
    """N, X, TEXT and lists of them stand for any value."""
    action: Any = next(action for action in parser._actions if flag in action.option_strings)
    assert action.completer(prefix="") == choices


def nested() -> Parser:
    """Return a parser with a command, as launcher/cli.py makes it."""
    made = Parser(prog="phalanx")
    commands = made.add_subparsers(dest="command", parser_class=Parser)
    add_config_flags(commands.add_parser("train", allow_abbrev=False))
    commands.add_parser("logs").add_argument("target")
    return made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--batch-sise", "3"],
         "unrecognized arguments: --batch-sise 3 (did you mean --batch-size?)"),
        (["train", "--batch-sise=3"], "unrecognized arguments: --batch-sise=3 (did you mean --batch-size?)"),
        (["train", "--warmup_stepz", "3"],
         "unrecognized arguments: --warmup_stepz 3 (did you mean --warmup_steps?)"),
        (["train", "--zzzzzzzz"], "unrecognized arguments: --zzzzzzzz"),
        (["train", "word"], "unrecognized arguments: word"),
        (["train", "--lr"], "argument --lr: expected one argument"),
        (["logs"], "the following arguments are required: target. See phalanx logs --help."),
    ],
)  # fmt: skip
def test_an_unknown_flag_is_refused_with_the_closest_one(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        nested().parse_args(argv)
    assert (end.value.code, capsys.readouterr()) == (2, ("", f"error: {message}\n"))


def test_a_percent_sign_in_a_description_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse reads % as the start of a format."""
    field = copy.copy(TrainConfig.model_fields["lr"])
    field.description = "Lower it by 50% at first."
    monkeypatch.setitem(TrainConfig.model_fields, "lr", field)
    monkeypatch.setenv("COLUMNS", "1000")
    made = argparse.ArgumentParser()
    add_config_flags(made)
    shown = r"^ +--lr X +Lower it by 50% at first\. \(default: 3e-05\)$"
    assert re.search(shown, made.format_help(), re.M)


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
