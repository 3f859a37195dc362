"""The files that Phalanx ships: examples load, the libraries read their configs, the wheel has all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from fakes import fake_model, run_command
from places import REPO


def files(folder: str, pattern: str) -> list:
    return [pytest.param(path, id=path.stem) for path in sorted((REPO / folder).glob(pattern))]


@pytest.mark.parametrize("path", files("examples", "*.yaml"))
def test_example_config_loads(work, monkeypatch, capsys, path):
    shutil.copytree(REPO / "examples", work / "examples")
    fake_model(work / ".demo" / "SmolLM2-135M-Instruct")
    more = ["--model", "model"] if path.stem == "mlm" else []
    code = run_command(["show", f"examples/{path.name}", "--json", *more], monkeypatch)
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", files("accelerate_configs", "*.yaml"))
def test_shipped_accelerate_config_is_read_by_accelerate(path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(REPO)
    config = load_config_from_file(str(path))
    assert config.num_machines == 1
    raw = yaml.safe_load(path.read_text())
    assert not raw.get("fsdp_config", {}).get("fsdp_activation_checkpointing", False)
    pointer = raw.get("deepspeed_config", {}).get("deepspeed_config_file")
    if path.stem.startswith("deepspeed"):
        assert json.loads((REPO / pointer).read_text())["train_batch_size"] == "auto"


@pytest.mark.parametrize("path", files("deepspeed_configs", "*.json"))
def test_shipped_deepspeed_config_is_read_by_deepspeed(path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = json.loads(path.read_text())["zero_optimization"]
    fixed = {key: value for key, value in zero.items() if value != "auto"}
    assert int(DeepSpeedZeroConfig(**fixed).stage) == int(path.stem[4])


def test_the_wheel_ships_the_static_files(tmp_path):
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(argv, cwd=REPO, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder, pattern in (
        ("accelerate_configs", "*.yaml"),
        ("deepspeed_configs", "*.json"),
        ("slurm", "*.sh"),
    ):
        for path in (REPO / folder).glob(pattern):
            assert f"{folder}/{path.name}" in names
    assert "launcher/cli.py" in names and not any(name.startswith("tests/") for name in names)
