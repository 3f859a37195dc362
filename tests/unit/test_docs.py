"""The pages are current: the generated page, links, fences, configs, and commands that cannot run here.

tests/distributed/test_docs_commands.py runs the other commands.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from fakes import fake_model, run_command
from pages import MARKERS, PAGES, TAGS, fences, text_after
from places import REPO

# A page shows a part of a config. This is the rest.
REST = {"task": "llm", "base_model": "org/name", "project_name": "page", "data": {"path": "examples/data"}}
BASE = ".demo/SmolLM2-135M-Instruct"
CONFIG = f"""\
task: llm
base_model: {BASE}
project_name: %s
data:
  path: examples/data
  chat_template: chatml
"""


@pytest.fixture
def checkout(work: Path) -> Path:
    """A working folder that looks like a checkout, with the files that the commands of the pages name."""
    for name in ("examples", "slurm"):
        shutil.copytree(REPO / name, work / name)
    fake_model(work / BASE)
    fake_model(work / "my-run")
    for name in ("config", "a", "b"):
        (work / f"{name}.yaml").write_text(CONFIG % f"run-{name}")
    for name in ("sweep.txt", "sweep-of-configs.txt"):
        (work / name).write_text(text_after("slurm.md", f"`{name}`"))
    return work


def test_config_page_matches_the_schema():
    spec = importlib.util.spec_from_file_location("make_config_page", REPO / "docs" / "make_config_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs" / "config.md").read_text() == module.page(), "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_to_files(page):
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_each_page_is_in_the_index():
    index = (REPO / "docs" / "README.md").read_text()
    for page in (REPO / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_each_fence_has_a_tag():
    assert [str(fence) for fence in fences() if fence.tag not in TAGS] == []


def test_a_fence_of_commands_runs_or_says_what_it_needs():
    for fence in fences("bash"):
        assert fence.commands, fence
        assert fence.marker in (None, *MARKERS), f"{fence}: {fence.marker}"
    assert {fence.marker for fence in fences("bash")} == {None, *MARKERS}


@pytest.mark.parametrize("fence", [f for f in fences("bash") if f.marker], ids=str)
def test_a_command_that_cannot_run_here_is_accepted(checkout, monkeypatch, capsys, fence):
    """Its arguments are checked as far as this is possible without what it needs."""
    for line in fence.commands:
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            done = subprocess.run(["make", "-n", *words], cwd=REPO, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif program == "pip":
            extras = re.search(r"\[(.*)\]", line)
            project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
            assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
            assert "-c" not in words or (REPO / words[words.index("-c") + 1]).is_file()
        elif program == "sbatch":  # tests/slurm gives the commands of the SLURM page to a real one
            script = next(word for word in words if word.endswith(".sh"))
            assert subprocess.run(["bash", "-n", checkout / script]).returncode == 0
            accepted_by_phalanx(words[words.index(script) :], monkeypatch, capsys)
        else:
            assert program == "phalanx"
            accepted_by_phalanx(words, monkeypatch, capsys)


def accepted_by_phalanx(words, monkeypatch, capsys):
    """Check a command of phalanx, or a job script with its arguments. Nothing is started or submitted."""
    command, *rest = words
    if command in ("train", "slurm/train.sh"):
        assert run_command(["show", *rest], monkeypatch) == 0, capsys.readouterr().err
    elif command in ("submit", "slurm/array.sh"):
        if command == "slurm/array.sh":  # the list, then the config that its lines may name instead
            rest = [*rest[1:], "--array", rest[0]]
        assert run_command(["submit", *rest, "--dry-run"], monkeypatch) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.startswith("sbatch ")
    elif command == "push":
        from launcher.cli import build_parser

        build_parser("push").parse_args(words)
    else:
        from launcher.commands.evaluate import command as evaluation

        assert command in ("evaluate", "slurm/evaluate.sh")
        assert evaluation(Path(rest[0]), rest[1:], gpus=0)[-2:] == rest[-2:]


def test_ci_runs_what_the_readme_begins_with():
    commands = fences("bash")[0].commands
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command}\b", (REPO / ".ci" / "run").read_text(), re.M)


INLINE = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(r"`(phalanx [a-z]+(?: [^`]+)?)`", page.read_text(encoding="utf-8"))
        if "|" not in command
    }
)


@pytest.mark.parametrize("command", INLINE)
def test_a_command_in_a_sentence_has_its_flags(command):
    """A command in a sentence may be a part of one, so only the command and its flags are checked."""
    from launcher.cli import build_parser
    from launcher.commands import COMMANDS

    name, *words = shlex.split(command)[1:]
    assert name in COMMANDS
    flags = {action for word in words if (action := word.partition("=")[0]).startswith("--")}
    if name == "evaluate":
        return  # lm-eval gets the flags
    known = set(build_parser(name)._flags()) | {"--help"}
    assert flags <= known


@pytest.mark.parametrize("fence", fences("yaml"), ids=str)
def test_a_config_of_the_pages_is_accepted(checkout, monkeypatch, fence):
    """Complete, or a part of one."""
    from launcher.config import load_run
    from launcher.plan.preflight import check_data

    monkeypatch.setenv("HF_USERNAME", "me")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    (checkout / "page.yaml").write_text(yaml.safe_dump(REST | yaml.safe_load(fence.text)))
    check_data(load_run(checkout / "page.yaml", {}).train)


def test_the_config_of_the_readme_gives_the_values_that_it_shows(checkout, monkeypatch, capsys):
    shutil.rmtree(checkout / "my-run")
    [block] = [fence.text for fence in fences("yaml") if fence.page == "README" and "task:" in fence.text]
    (checkout / "readme.yaml").write_text(block)
    assert run_command(["show", "readme.yaml", "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["lr"]["value"] == 2e-4 and plan["backend"]["name"] == "ddp"


def test_json_and_python_of_the_pages_are_valid():
    for fence in fences("json", "python"):
        json.loads(fence.text) if fence.tag == "json" else compile(fence.text, str(fence), "exec")
