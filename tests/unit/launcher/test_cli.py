"""The commands import nothing heavy, and a file, flags and AutoTrain's flags describe the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from fakes import listing, run_command, write_rows

from launcher.commands import COMMANDS
from launcher.config import LaunchConfig
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig

CONFIG = """\
task: llm-sft
base_model: model
project_name: run
data:
  path: data
params:
  lr: 0.5
  batch_size: 3
"""
HEAVY = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed", "bitsandbytes")
PROBE = f"""
import sys
from launcher.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def config(work: Path, hardware: object) -> Path:
    (work / "c.yaml").write_text(CONFIG)
    return work / "c.yaml"


def show(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, object]:
    """Return what `phalanx show --json` prints."""
    assert run_command(["show", *argv, "--json"], monkeypatch) == 0
    plan: dict[str, object] = json.loads(capsys.readouterr().out)
    return plan


def values(plan: dict[str, object]) -> dict[str, object]:
    """Return the effective values, without their sources."""
    return {name: entry["value"] for name, entry in plan["config"].items()}


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["schema"],
        ["show", "c.yaml"],
        ["show", "c.yaml", "--json"],
        ["show", "c.yaml", "--num-processes", "2", "--distributed-backend", "fsdp"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(config: Path, argv: list[str]) -> None:
    before = listing(config.parent.parent)
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded:\n"
    assert done.stdout
    assert listing(config.parent.parent) == before


def test_train_imports_nothing_heavy_if_it_refuses_a_config(config: Path) -> None:
    config.write_text(CONFIG.replace("model", "./nowhere"))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "train", "c.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.endswith("loaded:\n")


def test_python_m_launcher_runs_phalanx(work: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"phalanx {version('phalanx')}\n")


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["--help"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


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


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"phalanx {version('phalanx')}\n"


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
    config.write_text(CONFIG.replace("llm-sft", "llm-dpo"))
    found = values(show(["c.yaml", "--block-size", "512,256"], monkeypatch, capsys))
    assert (found["block_size"], found["max_prompt_length"]) == ([512, 256], 256)


def test_a_flag_may_come_before_the_config(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert values(show(["--seed", "7", "c.yaml"], monkeypatch, capsys))["seed"] == 7


def test_show_prints_everything_and_writes_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(config.parent.parent)
    assert run_command(["show", "c.yaml", "--num-processes", "2"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert listing(config.parent.parent) == before
    titles = [line for line in out.splitlines() if line.startswith("# ")]
    here = config.parent / "run" / "launch" / "attempt-1"
    assert titles == [
        "# effective config", "# notes", "# backend", f"# {here}/accelerate.yaml", "# command",
        "# the same by hand", "# on SLURM", "# shipped files",
    ]  # fmt: skip
    for words in (
        "c.yaml:7",
        "flag --num-processes",
        "default",
        "derived: ",
        "ddp: the model fits",
        "2 ranks on 1 machine, cpu",
    ):
        assert words in out


def test_show_names_the_next_attempt(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        (config.parent / "run" / "launch" / f"attempt-{number}").mkdir(parents=True)
        (config.parent / "run" / "launch" / f"attempt-{number}" / "command.txt").touch()
    assert show(["c.yaml", "--overwrite"], monkeypatch, capsys)["folder"].endswith("run/launch/attempt-3")


def test_json_and_text_agree(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ["--main-process-port", "23456"]
    plan = show(["c.yaml", *ports], monkeypatch, capsys)
    assert run_command(["show", "c.yaml", *ports], monkeypatch) == 0
    out = capsys.readouterr().out
    assert set(plan["config"]) == set(TrainConfig.model_fields) - {"token"}
    for name, entry in {**plan["config"], **plan["launch"]}.items():
        value = entry["value"] if isinstance(entry["value"], str) else json.dumps(entry["value"])
        assert any(
            line.split() == [name, *value.split(), *entry["source"].split()] for line in out.splitlines()
        ), name
    assert " ".join(plan["command"]) in out


def test_the_shipped_files_that_show_names_exist(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = show(["c.yaml"], monkeypatch, capsys)
    assert all(Path(path).is_dir() for path in plan["static_files"].values())
    assert Path(plan["by_hand"][plan["by_hand"].index("--config_file") + 1]).is_file()


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


def test_an_effective_config_can_be_shown(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.config import load_run
    from trainers.config.file import write_effective

    write_effective(load_run(Path("c.yaml"), {}).settings, Path("config.json"))
    first, second = show(["c.yaml"], monkeypatch, capsys), show(["config.json"], monkeypatch, capsys)
    assert (first["config"], first["notes"]) == (second["config"], second["notes"])


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
