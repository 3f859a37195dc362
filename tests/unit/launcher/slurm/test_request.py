"""sbatch's argv from the slurm section: a list, quoted only to be shown; nothing that a shell misreads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fakes import listing, run_command

from launcher.config import Run, load_run
from launcher.slurm.request import TRAIN as SCRIPT
from launcher.slurm.request import sbatch_argv
from trainers.config.errors import ConfigError

BASE = "task: llm-sft\nbase_model: model\nproject_name: run\ndata: {path: data}\n"
Read = Callable[..., Run]


@pytest.fixture
def read(work: Path) -> Read:
    """`read(partition="gpu")`: a run with this slurm section."""

    def load(**slurm: object) -> Run:
        Path("c.yaml").write_text(BASE + yaml.safe_dump({"slurm": slurm}))
        return load_run(Path("c.yaml"), {})

    return load


def test_all_keys(read: Read) -> None:
    run = read(
        nodes=2, gpus_per_node=8, cpus_per_task=64, time="1-12:00:00", partition="gpu,long", account="proj.1",
        qos="high", job_name="my-run",
    )  # fmt: skip
    assert sbatch_argv(run) == [
        "sbatch",
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--time=1-12:00:00",
        "--partition=gpu,long",
        "--account=proj.1",
        "--qos=high",
        "--job-name=my-run",
        str(SCRIPT),
        "c.yaml",
    ]


def test_what_is_not_set_is_left_to_the_site(read: Read) -> None:
    assert sbatch_argv(read()) == ["sbatch", str(SCRIPT), "c.yaml"]


def test_no_gpus_is_a_choice(read: Read) -> None:
    assert "--gpus-per-node=0" in sbatch_argv(read(gpus_per_node=0))


def test_without_a_file(work: Path) -> None:
    assert sbatch_argv(load_run(None, {"trainer": "sft"}))[-1] == "config.yaml"


TEXTS = [
    "gres",
    "mem",
    "time",
    "partition",
    "account",
    "qos",
    "reservation",
    "nodelist",
    "exclude",
    "dependency",
]


def test_a_name_may_have_spaces(read: Read) -> None:
    assert "--job-name=my run" in sbatch_argv(read(job_name="my run"))


def test_features_have_operators(read: Read) -> None:
    assert "--constraint=a100&ib*2" in sbatch_argv(read(constraint="a100&ib*2"))


def test_a_dependency_that_cannot_come_ends_the_job(read: Read) -> None:
    assert "--kill-on-invalid-dep=yes" in sbatch_argv(read(dependency="afterok:12"))
    assert "--kill-on-invalid-dep=yes" not in sbatch_argv(read(dependency="singleton"))


@pytest.mark.parametrize("key", [*TEXTS, "job_name", "constraint"])
@pytest.mark.parametrize(
    "value",
    [
        "a\nb",
        "a\n",
        "\na",
        "a\r",
        "a'b",
        'a"b',
        "a;b",
        "$(id)",
        "`id`",
        "a>b",
        "a\\b",
        "a\0b",
        "",
        "ä",
    ],
)
def test_values_that_are_refused(read: Read, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"c.yaml:\d+: slurm.{key}: ") as refused:
        read(**{key: value})
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("value", ["a b", "a&b", "a|b", "a*"])
def test_values_that_only_some_refuse(read: Read, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"c.yaml:\d+: slurm.{key}: "):
        read(**{key: value})


def test_a_variable_is_checked_after_it_is_read(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_ACCOUNT", "team --wrap=id")
    with pytest.raises(ConfigError, match=r"slurm\.account"):
        read(account="${PX_ACCOUNT}")
    monkeypatch.setenv("PX_ACCOUNT", "team")
    assert "--account=team" in sbatch_argv(read(account="${PX_ACCOUNT}"))


@pytest.mark.parametrize(
    ("key", "value"), [("nodes", 0), ("nodes", 1.5), ("gpus_per_node", -1), ("cpus_per_task", "x")]
)
def test_numbers_that_are_refused(read: Read, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"slurm.{key}: "):
        read(**{key: value})


def test_show_prints_it_and_submits_nothing(
    read: Read,
    work: Path,
    hardware: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read(nodes=2, job_name="mine")
    before = listing(work.parent)
    assert run_command(["show", "c.yaml"], monkeypatch) == 0
    assert f"sbatch --nodes=2 --job-name=mine {SCRIPT} c.yaml" in capsys.readouterr().out
    assert run_command(["show", "c.yaml", "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sbatch"] == ["sbatch", "--nodes=2", "--job-name=mine", str(SCRIPT), "c.yaml"]
    assert listing(work.parent) == before
