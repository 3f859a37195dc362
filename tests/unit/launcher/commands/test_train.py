"""`phalanx train`, and AutoTrain's form of it, `phalanx llm`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import run_command


def test_autotrains_flags_describe_the_same_run_as_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.commands import train

    seen = []
    monkeypatch.setattr(train, "_train", lambda run, layout: seen.append(run) or 0)
    file = ["train", "c.yaml"]
    flags = [
        "llm", "--train", "--trainer", "sft", "--model", "model", "--project-name", "run",
        "--data-path", "data", "--lr", "0.5", "--batch_size", "3", "--backend", "local",
    ]  # fmt: skip
    for argv in (file, flags):
        assert run_command(argv, monkeypatch) == 0
    assert seen[0].train == seen[1].train
    assert seen[0].launch == seen[1].launch
    assert seen[0].settings.notes == seen[1].settings.notes
    assert seen[1].settings.sources["model"] == "flag --model"


def test_train_prints_what_was_decided(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher import cli
    from launcher.supervise import supervisor

    monkeypatch.setattr(supervisor, "train", lambda *_: 0)
    assert cli.main(["train", "c.yaml"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("note: quantization: ")
    assert out[1].startswith("note: block_size: 1024")
    assert out[2] == "backend: none (one process); 1 CPU rank"
    assert out[3] == "done: run (model, run.json, metrics.jsonl)"


@pytest.mark.parametrize("code", [1, 2, 130, 143])
def test_train_returns_the_exit_code_of_the_run(config: Path, code: int, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from launcher import cli
    from launcher.supervise import supervisor

    monkeypatch.setattr(supervisor, "train", lambda *_: code)
    assert cli.main(["train", "c.yaml"]) == code
    assert "done" not in capsys.readouterr().out
