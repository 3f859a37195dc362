"""The flags, one for each config field and grouped as in the docs, and the parser that reads them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from trainers.config.errors import DISK_FAILED, USAGE_ERROR
from trainers.config.field_types import read_none
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.redaction import redacted
from trainers.rank.terminal import has_lost_output

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

BOOLEAN = "true|false"
# How --help shows a value that is not one of a few choices.
KINDS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """An argparse parser, which suggests the nearest valid flag and exits with USAGE_ERROR."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        if unknown != message and unknown.startswith("--"):
            close = difflib.get_close_matches(unknown, self._flags(), n=1)
            message += f" (did you mean {close[0]}?)" if close else ""
        if "arguments are required" in message:
            message += f". See {self.prog} --help."
        self.exit(USAGE_ERROR, f"error: {redacted(message)}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program. --help and --version end here: what they print is their result."""
        if status == 0 and has_lost_output():
            status = DISK_FAILED
        super().exit(status, message)

    def _flags(self) -> list[str]:
        """Return every flag of this parser and of its commands.

        argparse reports an unknown flag from the top parser, also where the flag follows a command.
        """
        found: list[str] = []
        for action in self._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser._flags()]
        return found


def add_config_flags(parser: argparse.ArgumentParser, slurm: bool = False) -> None:
    """Add a flag for each field of the schema, and hidden flags for the names that other tools use.

    `--lr`, `--learning-rate` and `--learning_rate` all work; --help shows only the first.
    """
    from launcher.config import LaunchConfig, SlurmConfig
    from trainers.config.schema import TrainConfig, sections

    others: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        others.setdefault(name, []).append(alias)
    groups = [
        (title, {name: TrainConfig.model_fields[name] for name in names}) for title, names in sections()
    ]
    groups.append(("Launch", LaunchConfig.model_fields))
    if slurm:
        groups.append(("SLURM", SlurmConfig.model_fields))
    for title, fields in groups:
        group = parser.add_argument_group(title)
        for name, field in fields.items():
            _add_flag(group, name, field, _help(field))
            for alias in others.get(name, ()):
                _add_flag(group, alias, field, argparse.SUPPRESS)
    for switch in SWITCHES:
        for spelling in _spellings(switch):
            parser.add_argument(
                spelling,
                dest=switch,
                nargs="?",
                const="true",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def _add_flag(group: Any, name: str, field: FieldInfo, text: str) -> None:
    """Add a flag, and its spelling with underscores, which --help does not show."""
    words = list(values_of(field.annotation))
    if NoneType in get_args(field.annotation) and not _reads_none(field):  # null only by leaving it out
        words = [word for word in words if word != "none"]
    # As in AutoTrain, --peft means --peft true.
    more: dict[str, Any] = {"nargs": "?", "const": "true"} if BOOLEAN in words else {}
    for shown, spelling in zip((text, argparse.SUPPRESS), _spellings(name), strict=False):
        action = group.add_argument(
            spelling, dest=name, default=argparse.SUPPRESS, metavar="|".join(words), help=shown, **more
        )
        choices = [choice for word in words for choice in word.split("|") if not _is_kind(word)]
        action.completer = lambda choices=choices, **_: choices  # argcomplete's name for it


def _reads_none(field: FieldInfo) -> bool:
    """Whether the word `none` as a flag's value means null."""
    return any(getattr(mark, "func", None) is read_none for mark in field.metadata)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))


def _help(field: FieldInfo) -> str:
    text, default = field.description or "", field.default
    if default not in (None, ""):
        text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    return text.replace("%", "%%")


def _is_kind(word: str) -> bool:
    """Whether a word of values_of() stands for any value: N, X, TEXT, or a list of them."""
    return word.removesuffix(",...") in KINDS.values()


def values_of(annotation: Any) -> Iterator[str]:
    """Yield how --help shows the values of a type: each choice, or N, X or TEXT for any other type.

    Literal["fp16", "bf16"] | None -> fp16, bf16, none
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from values_of(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        parts = [word for part in get_args(annotation) for word in values_of(part)]
        # Show none only among other choices. For an optional number or text, the description says it.
        only_kinds = all(word == "none" or _is_kind(word) for word in parts)
        yield from dict.fromkeys(word for word in parts if not (word == "none" and only_kinds))
    elif origin is Literal:
        yield from (str(choice) for choice in get_args(annotation))
    elif origin is list and get_origin(get_args(annotation)[0]) is dict:
        yield KINDS[str]  # JSON
    elif origin is list:
        yield ",".join([*values_of(get_args(annotation)[0]), "..."])
    elif origin is dict:
        yield KINDS[str]
    elif annotation is NoneType:
        yield "none"
    else:
        yield BOOLEAN if annotation is bool else KINDS[annotation]
