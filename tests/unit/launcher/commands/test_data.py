"""`phalanx data`: what it gives to trainers/show_data.py, and what it refuses itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import run_command

from launcher.commands import data
from trainers.config.errors import DISK_FAILED

SECRET = "hf_canaryCanaryCanaryCanaryCanary"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The processes that the command starts, which are not started, and end with code 7."""
    calls: list[dict[str, Any]] = []

    def run(argv: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        calls.append({"argv": argv, **named})
        return subprocess.CompletedProcess(argv, 7)

    monkeypatch.setattr(data.subprocess, "run", run)
    return calls


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], ["--rows", "5", "--split", "train"]),
        (["--rows", "all", "--json"], ["--rows", "-1", "--split", "train", "--json"]),
        (["--source", "a"], ["--rows", "5", "--split", "train", "--source", "a"]),
        (["--rows", "0", "--html", "a.html"], ["--rows", "0", "--split", "train", "--html", "a.html"]),
    ],
)
def test_the_arguments_and_the_exit_code_are_passed_on(
    config: Path,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    arguments: list[str],
) -> None:
    assert run_command(["data", "c.yaml", *words], monkeypatch) == 7
    (call,) = started
    assert call["argv"] == [sys.executable, "-m", "trainers.show_data", "/dev/stdin", *arguments]


def test_the_effective_config_is_passed_on_without_its_token(
    config: Path, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--token", SECRET, "--train-on", "all"]
    assert run_command(["data", "c.yaml", *flags], monkeypatch) == 7
    (call,) = started
    given = json.loads(call["input"])
    assert given["config"]["train_on"] == "all" and given["sources"]["train_on"] == "flag --train-on"
    assert given["sources"]["lr"] == "c.yaml:7"
    assert SECRET not in call["input"] + " ".join(call["argv"])
    assert call["env"]["HF_TOKEN"] == SECRET


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "some"], "argument --rows: 'some' must be a number from 0 on, or all"),
        (["--rows", "-1"], "argument --rows: '-1' must be a number from 0 on, or all"),
        (["--split", "dev"], "argument --split: invalid choice: 'dev'"),
        (["--json", "--html", "a.html"], "argument --html: not allowed with argument --json"),
        (["--text-column", "answer"], "flag --text-column: data.column_mapping.text_column: there is no"),
        (["--valid-split", "dev"], "flag --valid-split: data.valid_split: there is no split 'dev' in data."),
    ],
)
def test_a_mistake_is_refused_before_anything_heavy_starts(
    config: Path,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert run_command(["data", "c.yaml", *words], monkeypatch) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert started == []


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_output_that_is_lost_or_that_nobody_reads(work: Path, tiny_model: Path, form: list[str]) -> None:
    """A full disk is an error, a reader that is gone is none."""
    Path("c.yaml").write_text(
        f"task: llm-sft\nbase_model: {tiny_model}\nproject_name: run\ndata: {{path: data}}\n"
        f"hub: {{token: {SECRET}}}\n"
    )
    ours, pipe = os.pipe()
    os.close(ours)
    environ = {**os.environ, "PHALANX_CACHE": str(work / "cache")}
    argv = [sys.executable, "-m", "launcher", "data", "c.yaml", *form]
    with open("/dev/full", "w") as full:
        processes = [
            subprocess.Popen(argv, text=True, stdout=to, stderr=subprocess.PIPE, env=environ)
            for to in (subprocess.PIPE, pipe, full)
        ]
    os.close(pipe)
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, DISK_FAILED], ended
    (out, first), (_, second), (_, third) = ended
    assert (first, second) == ("", "")
    assert third == "warning: stdout: No space left on device; the rest of the output is lost\n"
    assert out.startswith(
        '{"row": 1, "samples": [' if form else "# data\ntrain: 2 rows of data/train.jsonl\n"
    )
    assert SECRET not in out + first + second + third
