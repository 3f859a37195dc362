"""Every command of the README works, in a folder that looks like a checkout; every shipped config loads,
and the configs that the pages of docs/ show are accepted.

The tiny model replaces the model of the demo, at the same path. So the commands run as they are written.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from places import REPO

README = (REPO / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line
]

# A page shows a part of a config. This is the rest.
REST = {"task": "llm", "base_model": "org/name", "project_name": "page", "data": {"path": "examples/data"}}
FENCED = {
    kind: [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in sorted((REPO / "docs").glob("*.md"))
        for number, block in enumerate(re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.S))
    ]
    for kind in ("yaml", "bash")
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_model) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "accelerate_configs", "deepspeed_configs", "slurm"):
        shutil.copytree(REPO / name, root / name)
    shutil.copytree(tiny_model, root / ".demo" / "SmolLM2-135M-Instruct")
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_works(bench, checkout, command):
    argv = shlex.split(command)
    if argv[0] == "make":  # not run here: `make test` runs this test, and .ci/run runs `make demo`
        assert re.search(rf"^{argv[1]}:", (REPO / "Makefile").read_text(), re.M)
        assert f"make {argv[1]}" in (REPO / ".ci" / "run").read_text()
        return
    if argv[0] == "pip":  # not run here: the Makefile installs in this way
        extras = re.search(r"\[(.*)\]", command)
        project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
        assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
        assert (REPO / "constraints.txt").exists()
        return
    if argv[0] == "sbatch":  # not run here: tests/slurm submits it to a real cluster
        script = next(word for word in argv if word.endswith(".sh"))
        assert subprocess.run(["bash", "-n", checkout / script]).returncode == 0
        return
    shutil.rmtree(checkout / ".demo" / "run", ignore_errors=True)
    done = subprocess.run(argv, cwd=checkout, env=bench.environ, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--project-name" in argv:
        folder = checkout / argv[argv.index("--project-name") + 1]
        assert (folder / "run.json").exists() and (folder / "metrics.jsonl").exists()


def test_the_config_of_the_readme_is_accepted(checkout, monkeypatch, capsys):
    from launcher.cli import main

    monkeypatch.chdir(checkout)
    block = re.search(r"```yaml\n(task:.*?)```", README, re.S)
    assert block
    shutil.rmtree(checkout / "my-run", ignore_errors=True)
    (checkout / "readme.yaml").write_text(block[1])
    assert main(["show", "readme.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["lr"]["value"] == 2e-4 and plan["backend"]["name"] == "ddp"


@pytest.mark.parametrize("block", FENCED["yaml"])
def test_yaml_of_the_pages_is_accepted(checkout, monkeypatch, block):
    from launcher.config import load_run
    from launcher.plan.preflight import check_data

    monkeypatch.chdir(checkout)
    monkeypatch.setenv("HF_USERNAME", "me")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    shown = yaml.safe_load(block)
    (checkout / "page.yaml").write_text(yaml.safe_dump(REST | shown))
    check_data(load_run(checkout / "page.yaml", {}).train)


@pytest.mark.parametrize("block", FENCED["bash"])
def test_command_of_the_pages_is_accepted(checkout, monkeypatch, capsys, block):
    from launcher.cli import main

    monkeypatch.chdir(checkout)
    for line in block.splitlines():
        program, command, *words = shlex.split(line)
        assert (program, command) == ("phalanx", "train")
        assert main(["show", *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((REPO / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_config_loads(checkout, monkeypatch, capsys, path):
    from launcher.cli import main

    monkeypatch.chdir(checkout)
    shutil.rmtree(checkout / ".demo" / "run", ignore_errors=True)
    assert main(["show", f"examples/{path.name}", "--json"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((REPO / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem
)
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


@pytest.mark.parametrize(
    "path", sorted((REPO / "deepspeed_configs").glob("*.json")), ids=lambda path: path.stem
)
def test_shipped_deepspeed_config_is_read_by_deepspeed(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = json.loads(path.read_text())["zero_optimization"]
    fixed = {key: value for key, value in zero.items() if value != "auto"}
    assert int(DeepSpeedZeroConfig(**fixed).stage) == int(path.stem[4])


def test_the_wheel_ships_the_static_files(tmp_path):
    import zipfile

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
