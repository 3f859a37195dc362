"""`phalanx completion SHELL`: print the script that completes commands, flags and choices in a shell."""

from __future__ import annotations

import argparse

HELP = "print a script that completes commands and flags in your shell"
USAGE = "bash|zsh|fish"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help='for bash: eval "$(phalanx completion bash)"'
    )


def run(shell: str) -> int:
    import argcomplete

    print(argcomplete.shellcode(["phalanx"], shell=shell))
    return 0
