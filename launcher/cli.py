"""`phalanx COMMAND ...`: find the command's module, read its flags, and run it. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from launcher.commands import COMMANDS
from launcher.parser import Parser
from trainers.config.errors import DISK_FAILED, USAGE_ERROR, ConfigError
from trainers.config.redaction import hide_in_tracebacks, remember_flags
from trainers.rank.failures import for_user
from trainers.rank.say import say
from trainers.rank.terminal import has_lost_output, outlive_readers

RUNS = ("llm", "train")  # the result of these commands is not their output


@cache
def build_parser(command: str | None) -> Parser:
    """Return the parser. Only the named command gets its flags, so that --help stays fast."""
    from importlib.metadata import version

    parser = Parser(
        prog="phalanx", description="Fine-tune language models on many GPUs: one config, one command."
    )
    parser.add_argument("--version", action="version", version=f"phalanx {version('phalanx')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        module = _module(name)
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            usage=f"phalanx {name} {module.USAGE}".rstrip(),
            allow_abbrev=False,
        )
        if name == command:
            module.add_arguments(sub)
    return parser


def _module(command: str) -> Any:
    """Return the module launcher.commands.NAME, which has HELP, USAGE, add_arguments() and run()."""
    return importlib.import_module(f"launcher.commands.{command}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (docs/exit-codes.md)."""
    outlive_readers()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions (`phalanx completion`)
        arguments = os.environ.get("COMP_LINE", "").split()[1:]
    hide_in_tracebacks()
    remember_flags(arguments)
    parser = build_parser(next((word for word in arguments if not word.startswith("-")), None))
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    options = vars(parser.parse_args(arguments))
    try:
        command = options.pop("command")
        code: int = _module(command).run(**options)
        if code == 0 and command not in RUNS and has_lost_output():
            return DISK_FAILED
        return code
    except ConfigError as error:
        for line in str(error).splitlines():
            say("error", line)
        return USAGE_ERROR
    except OSError as error:
        if (found := for_user(error)) is None:
            raise
        say("error", found[0])
        return found[1]
    except KeyboardInterrupt:  # before ranks were started, or in a command without ranks
        return 128 + signal.SIGINT
