"""A secret at a wrong place is not printed, not written, and not given to sbatch, by any command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import machine, run_command

from launcher.config import load_run
from launcher.plan.backend import resolve_backend
from launcher.plan.topology import resolve_topology
from launcher.supervise import attempt

SECRET = "hf_canaryCanaryCanaryCanaryCanary"
PLAIN = "correct/horse'battery"  # a secret without a known form
URL = f"https://me:{SECRET}@host/rows"
GOOD = {
    "task": "llm-sft",
    "base_model": "model",
    "project_name": "run",
    "data": "{path: data}",
    "params": "{lr: 0.1}",
    "hub": "{push_to_hub: false}",
    "launch": "{start: warm}",
    "slurm": "{nodes: 1}",
}
SECTIONS = ("data", "params", "hub", "launch", "slurm")
COMMANDS = (["train"], ["show"], ["show", "--json"], ["data"], ["submit"], ["submit", "--dry-run"])


def config(**changes: str) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {**GOOD, **changes}.items())


FILES = {
    **{f"{name} is a token": config(**{name: SECRET}) for name in (*SECTIONS, "task", "log", "backend")},
    **{f"{name} is a list": config(**{name: f"[{SECRET}, {PLAIN}]"}) for name in SECTIONS},
    **{f"{name} is a word of no form": config(**{name: PLAIN}) for name in SECTIONS},
    **{f"{name} is a variable": config(**{name: "${PX_OTHER}"}) for name in (*SECTIONS, "project_name")},
    **{f"{name} has several lines": config(**{name: f"|\n  a\n  {SECRET}"}) for name in SECTIONS},
    **{f"a misspelled key in {name}": config(**{name: f"{{tokn: {PLAIN}}}"}) for name in SECTIONS},
    **{f"a list in another key of {name}": config(**{name: f"{{apikey: [{PLAIN}]}}"}) for name in SECTIONS},
    **{f"a token is a key of {name}": config(**{name: f"{{{SECRET}: 1}}"}) for name in SECTIONS},
    "a misspelled key at the top": config(hub_token=PLAIN),
    "a token is a key at the top": config(**{SECRET: "1"}),
    "a mapping in a column": config(data=f"{{path: data, column_mapping: {{text_column: [{SECRET}]}}}}"),
    "a column mapping is a token": config(data=f"{{path: data, column_mapping: {SECRET}}}"),
    "the user's name is a list": config(hub=f"{{username: [{SECRET}]}}"),
    "the user's name is a token": config(hub=f"{{username: {SECRET}}}"),
    "the user's name is a variable": config(hub="{username: '${PX_OTHER}'}"),
    "the user's name is the token of the environment": config(hub="{username: '${HF_TOKEN}'}"),
    "a token is a mapping": config(hub=f"{{token: {{a: {PLAIN}}}}}"),
    "a token is a list": config(hub=f"{{token: [{PLAIN}]}}"),
    "two tokens": config(hub=f"{{token: {PLAIN}}}", params=f"{{token: {SECRET}}}"),
    "a mistake with a token": config(hub=f"{{token: {PLAIN}}}", params=f"{{lr: {PLAIN}}}"),
    "a token for a number": config(params=f"{{lr: {SECRET}}}"),
    "a token for a choice": config(params=f"{{log: {SECRET}}}"),
    "a token for a number of ranks": config(launch=f"{{num_processes: {SECRET}}}"),
    "a token for a number of nodes": config(slurm=f"{{nodes: {SECRET}}}"),
    "a token for an account": config(slurm=f"{{account: {SECRET}}}"),
    "a token for the name of the run": config(params=f"{{run_name: {SECRET}}}"),
    "a token for a folder": config(project_name=f"runs/{SECRET}"),
    "the data's address": config(data=f"{{path: '{URL}'}}"),
    "the model's address": config(base_model=URL),
    "an address with a parameter": config(base_model=f"https://host/model?access_token={PLAIN}"),
    "the address in a list": config(data=f"{{path: ['{URL}']}}"),
    "an alias": config(hub=f"{{token: *{SECRET}}}"),
    "a tag": config(hub=f"{{token: !{SECRET} a}}"),
    "YAML that ends too early": config(hub=f"{{token: {SECRET}"),
    "a file of one word": SECRET,
    "a file that is a list": f"- {SECRET}\n",
}  # fmt: skip
FLAGS = {
    "a wrong flag with a token": ["--token", PLAIN, "--lr", "many"],
    "an unknown flag with a token": ["--token", PLAIN, "--no-such-flag", "1"],
    "a misspelled flag": ["--tokn", PLAIN],
    "a misspelled flag with an equals sign": [f"--hub-token={PLAIN}"],
    "a token for a number": ["--lr", SECRET],
    "a token for a choice": ["--log", SECRET],
    "a token for a switch": ["--peft", SECRET],
    "a token for the user's name": ["--username", SECRET],
    "a token that is no flag": [SECRET],
    "the data's address": ["--data-path", URL],
    "the model's address": ["--model", URL],
    "two spellings": ["--model", URL, "--base-model", "model"],
}
PATHS = (URL, f"{SECRET}.yaml", f"folder/{SECRET}")
Check = Callable[[list[str]], None]


@pytest.fixture
def check(
    work: Path,
    hardware: Callable[..., None],
    packages: object,
    submitted: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Check:
    """Return check(argv): the command is refused, and the secret is in no output and in no file."""
    hardware(machine(gpus=1))
    monkeypatch.setenv("PX_OTHER", SECRET)
    monkeypatch.setenv("HF_TOKEN", "the token's staple")

    def run(argv: list[str]) -> None:
        assert run_command(argv, monkeypatch) == 2
        shown = "".join(capsys.readouterr())
        assert "error: " in shown
        assert [word for word in ("anary", "battery", "staple") if word in shown] == []
        written = [path for path in work.parent.rglob("*") if path.is_file() and path.name != "c.yaml"]
        assert [path for path in written if b"anary" in path.read_bytes()] == []

    return run


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
def test_a_secret_in_a_config_is_not_shown(text: str, check: Check) -> None:
    Path("c.yaml").write_text(text)
    for command, *more in COMMANDS:
        check([command, "c.yaml", *more])


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_a_secret_in_a_flag_is_not_shown(flags: list[str], check: Check) -> None:
    Path("c.yaml").write_text(config())
    for command, *more in COMMANDS:
        check([command, "c.yaml", *more, *flags])
    check(["llm", "--train", "--model", "model", "--project-name", "run", "--data-path", "data", *flags])


@pytest.mark.parametrize("line", [["--tokn", PLAIN], ["--lr", SECRET], ["--data-path", URL], [SECRET]])
def test_a_secret_in_a_line_of_an_array_is_not_shown(line: list[str], check: Check) -> None:
    Path("c.yaml").write_text(config())
    Path("c.yaml").with_name("sweep").mkdir()
    Path("sweep/c.yaml").write_text(" ".join(["--project-name", "run", *line]) + "\n")
    check(["submit", "c.yaml", "--array", "sweep/c.yaml"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("command", ["train", "show", "data", "submit", "consolidate", "evaluate"])
def test_a_secret_in_a_path_is_not_shown(command: str, path: str, check: Check) -> None:
    check([command, path])


def test_a_config_whose_name_has_a_secret_is_refused(check: Check) -> None:
    """Each value has its source, the path and the line, in run.json."""
    Path(f"{SECRET}.yaml").write_text(config())
    check(["show", f"{SECRET}.yaml"])


@pytest.mark.parametrize("where", ["file", "flag", "variable", "environment"])
def test_a_token_is_in_no_file_of_an_attempt(
    where: str, work: Path, hardware: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"file": f"{{token: {SECRET}}}", "variable": "{token: '${PX_OTHER}'}"}.get(where, GOOD["hub"])
    monkeypatch.setenv({"environment": "HF_TOKEN"}.get(where, "PX_OTHER"), SECRET)
    Path("c.yaml").write_text(config(hub=hub))
    run = load_run(Path("c.yaml"), {"token": SECRET} if where == "flag" else {})
    topology = resolve_topology(run.launch, machine())
    files, argv = attempt.prepare(run, topology, resolve_backend(run, topology))
    assert run.train.token == SECRET and SECRET not in " ".join(argv)
    written = list(files.folder.iterdir())
    assert {"accelerate.yaml", "config.json", "command.txt"} <= {path.name for path in written}
    assert [path for path in written if SECRET in path.read_text()] == []


def test_a_traceback_hides_secrets(work: Path) -> None:
    script = (
        "import sys\n"
        "from launcher import cli\n"
        f"def run(**_): raise OSError('cannot connect to {URL}')\n"
        "cli._module('schema').run = run\n"
        "sys.exit(cli.main(['schema']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "OSError: cannot connect to https://(hidden)@host/rows" in done.stderr
    assert "anary" not in done.stdout + done.stderr
