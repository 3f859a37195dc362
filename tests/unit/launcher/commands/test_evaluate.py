"""`phalanx evaluate`: lm-eval's command. tests/training runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands import evaluate
from launcher.commands.evaluate import command
from trainers.config.errors import ConfigError


@pytest.fixture
def full_model(work: Path) -> Path:
    folder = Path("run")
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_a_full_model(full_model: Path) -> None:
    assert command(full_model, ["--tasks", "arc_easy", "--limit", "10"], 0) == [
        *(sys.executable, "-m", "trainers.evaluate", "lm_eval", "run"),
        *("--model", "hf", "--model_args", "pretrained=run"),
        *("--output_path", "run/evaluation", "--tasks", "arc_easy", "--limit", "10"),
    ]


def test_an_adapter_on_its_base(work: Path) -> None:
    Path("run").mkdir()
    Path("run/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    argv = command(Path("run"), ["--model_args", "dtype=float32", "-o", "elsewhere"], 1)
    position = argv.index("--model_args")
    assert argv[position + 1 : position + 3] == [
        "pretrained=org/base,peft=run,tokenizer=run",
        "dtype=float32",
    ]
    assert argv[argv.index("--output_path") + 1] == "elsewhere"


def test_each_gpu_takes_a_share_unless_the_model_is_spread_over_them(full_model: Path) -> None:
    argv = command(full_model, ["--tasks", "a"], 4)
    assert argv[2:4] == ["trainers.evaluate", "accelerate.commands.launch"]
    assert argv[argv.index("--num_processes") + 1] == "4"
    assert argv[argv.index("lm_eval") - 2 : argv.index("lm_eval")] == ["-m", "trainers.evaluate"]
    assert command(full_model, ["--model_args", "parallelize=True"], 4)[3] == "lm_eval"


def test_a_missing_model_or_a_wrong_argument_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "nothing", "--tasks", "arc_easy"]) == 2
    assert "nothing: there is no final model" in capsys.readouterr().err
    assert main(["evaluate", "/dev/null", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == "error: /dev/null is not a folder. Give a run's folder.\n"
    Path("broken").mkdir()
    Path("broken/adapter_config.json").write_text("{}")
    assert main(["evaluate", "broken", "--tasks", "arc_easy"]) == 2
    assert "it does not name the base model" in capsys.readouterr().err
    Path("run").mkdir()
    Path("run/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a,trust=1"}))
    with pytest.raises(ConfigError, match="cannot load a path with a comma"):
        command(Path("run"), [], 0)
    Path("run/run.json").touch()
    with pytest.raises(ConfigError, match=r"^run/launch belongs to the run in"):
        command(Path("run"), ["-o", "run/launch"], 0)
    with pytest.raises(ConfigError, match=r"JSON cannot be joined .* Write name=value"):
        command(Path("run"), ["--model_args", '{"dtype": "float32"}'], 0)


def test_without_lm_eval_the_command_to_install_it_is_printed(
    full_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert main(["evaluate", "run", "--tasks", "arc_easy"]) == 2
    assert "pip install 'phalanx[evaluate]'" in capsys.readouterr().err
