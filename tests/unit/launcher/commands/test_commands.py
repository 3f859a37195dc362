"""Each command has a module that gives it a line of help, a usage, arguments, and a function for them."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
from fakes import run_command

from launcher import commands
from launcher.cli import build_parser
from launcher.commands import COMMANDS
from launcher.config import SlurmConfig


def module_of(command: str) -> Any:
    return importlib.import_module(f"launcher.commands.{command}")


def test_the_commands_are_the_modules_of_their_folder() -> None:
    modules = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    assert sorted(COMMANDS) == sorted(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_does_in_a_line(command: str) -> None:
    module = module_of(command)
    assert module.__doc__.startswith(f"`phalanx {command}"), "a module opens with its command"
    assert module.HELP and "\n" not in module.HELP
    assert module.HELP[0].islower() and not module.HELP.endswith("."), "a line of a list"


@pytest.mark.parametrize("command", COMMANDS)
def test_run_takes_the_arguments_that_the_command_adds(command: str) -> None:
    """The parsed arguments are given by name. A field that is not given is left out."""
    module = module_of(command)
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    always = {action.dest for action in parser._actions if action.default is not argparse.SUPPRESS}
    fields = {action.dest for action in parser._actions} - always
    signature = inspect.signature(module.run)
    signature.bind(**dict.fromkeys(always))
    signature.bind(**dict.fromkeys(always | fields))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_its_usage_and_what_it_does(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    module = module_of(command)
    assert run_command([command, "--help"], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: phalanx {command} {module.USAGE}".rstrip() + "\n")
    assert f"\n{module.HELP[0].upper()}{module.HELP[1:]}.\n" in out


def test_help_lists_the_commands_in_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["--help"], monkeypatch) == 0
    listed = " ".join(f"{command} {module_of(command).HELP}" for command in COMMANDS)
    assert listed in " ".join(capsys.readouterr().out.split())


def test_only_the_named_command_gets_its_flags() -> None:
    """So that the help of the others stays fast."""
    with pytest.raises(SystemExit):
        build_parser(None).parse_args(["train", "c.yaml", "--lr", "1"])
    assert build_parser("train").parse_args(["train", "c.yaml", "--lr", "1"]).lr == "1"


@pytest.mark.parametrize("command", COMMANDS)
def test_only_commands_that_show_or_submit_a_job_have_the_flags_of_slurm(command: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    module_of(command).add_arguments(parser)
    added = {action.dest for action in parser._actions}
    assert set(SlurmConfig.model_fields) & added == (
        set(SlurmConfig.model_fields) if command in ("show", "submit") else set()
    )
