"""Completion in a shell: the script of each shell, and what bash really completes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import run_command

HEAVY = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed", "bitsandbytes")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
# What bash does when Tab is pressed at the end of a line. Then print each completion in a line.
PRESS_TAB = """
source ./script
read -ra COMP_WORDS <<< "$1"
[[ $1 != *" " ]] || COMP_WORDS+=("")
COMP_LINE=$1 COMP_POINT=${#1} COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_TYPE=9
complete -p phalanx > complete || exit 1  # the script has not registered it
_python_argcomplete phalanx "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "complete -o nospace -o default -o bashdefault -F _python_argcomplete phalanx"),
        ("zsh", "compdef _python_argcomplete phalanx"),
        ("fish", "complete --command phalanx"),
    ],
)
def test_the_script_of_a_shell_is_printed(
    shell: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["completion", shell], monkeypatch) == 0
    out, err = capsys.readouterr()
    assert (line in out, err) == (True, "")


def test_another_shell_is_refused_with_the_shells_that_have_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["completion", "csh"], monkeypatch) == 2
    message = capsys.readouterr().err
    assert all(shell in message for shell in ("'csh'", "bash", "zsh", "fish"))


@pytest.fixture
def press_tab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[str]]:
    """`press_tab("phalanx tr")` returns the completions of this line in bash.

    Each heavy library is a module that cannot be imported. If it were, nothing would be completed.
    """
    assert run_command(["completion", "bash"], monkeypatch) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in HEAVY:
        (planted / f"{name}.py").write_text("raise SystemExit('imported')\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(planted)}

    def complete(line: str) -> list[str]:
        argv = ["bash", "--norc", "-c", PRESS_TAB, "bash", line]
        done = subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return [word.strip() for word in done.stdout.splitlines() if word]

    return complete


SAVING = ["--save-strategy", "--save-steps", "--save-minutes", "--save-total-limit"]


@needs_bash
@pytest.mark.parametrize(
    ("line", "completions"),
    [
        pytest.param("phalanx con", ["consolidate"], id="a-command"),
        pytest.param("phalanx train --batch", ["--batch-size"], id="a-flag"),
        pytest.param("phalanx train --save", SAVING, id="no-flag-twice"),
        pytest.param("phalanx train --per", ["--per-device-eval-batch-size"], id="no-names-of-other-tools"),
        pytest.param("phalanx show c.yaml --lr 1 --packing w", ["wrapped"], id="a-choice"),
        pytest.param("phalanx train --block-size ", [], id="no-choice-for-a-number"),
        pytest.param("phalanx completion ", ["-h", "--help", "bash", "zsh", "fish"], id="an-argument"),
    ],
)
def test_bash_completes_without_a_heavy_import(
    press_tab: Callable[[str], list[str]], line: str, completions: list[str]
) -> None:
    assert press_tab(line) == completions
