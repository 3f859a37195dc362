"""sbatch's argv from the section slurm: a list of words, in which a shell can misread nothing.

The words are quoted only when they are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher.config import Run, load_run
from launcher.slurm.request import TRAIN as SCRIPT
from launcher.slurm.request import requested, sbatch_argv
from trainers.config.errors import ConfigError

BASE = "task: llm-sft\nbase_model: model\nproject_name: run\ndata: {path: data}\n"
Read = Callable[..., Run]


@pytest.fixture
def read(work: Path) -> Read:
    """Return read(): `read(partition="gpu")` loads a run with this section slurm."""

    def load(**slurm: object) -> Run:
        Path("c.yaml").write_text(BASE + yaml.safe_dump({"slurm": slurm}))
        return load_run(Path("c.yaml"), {})

    return load


def test_keys_become_flags(read: Read) -> None:
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


def test_a_key_that_is_not_set_gives_no_flag(read: Read) -> None:
    assert sbatch_argv(read()) == ["sbatch", "--job-name=run", str(SCRIPT), "c.yaml"]


def test_zero_gpus_gives_a_flag(read: Read) -> None:
    assert "--gpus-per-node=0" in sbatch_argv(read(gpus_per_node=0))


def test_without_a_file_the_command_names_config_yaml(work: Path) -> None:
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


def test_a_job_name_may_have_spaces(read: Read) -> None:
    assert "--job-name=my run" in sbatch_argv(read(job_name="my run"))


def test_a_constraint_may_have_operators(read: Read) -> None:
    assert "--constraint=a100&ib*2" in sbatch_argv(read(constraint="a100&ib*2"))


def test_a_dependency_that_cannot_be_met_ends_the_job(read: Read) -> None:
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
def test_other_characters_are_refused(read: Read, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"c.yaml:\d+: slurm.{key}: ") as refused:
        read(**{key: value})
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("value", ["a b", "a&b", "a|b", "a*"])
def test_spaces_and_operators_are_refused_in_other_keys(read: Read, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"c.yaml:\d+: slurm.{key}: "):
        read(**{key: value})


def test_a_variable_is_checked_after_it_is_replaced(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_ACCOUNT", "team --wrap=id")
    with pytest.raises(ConfigError, match=r"slurm\.account"):
        read(account="${PX_ACCOUNT}")
    monkeypatch.setenv("PX_ACCOUNT", "team")
    assert "--account=team" in sbatch_argv(read(account="${PX_ACCOUNT}"))


@pytest.mark.parametrize(
    ("key", "value"), [("nodes", 0), ("nodes", 1.5), ("gpus_per_node", -1), ("cpus_per_task", "x")]
)
def test_wrong_numbers_are_refused(read: Read, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"slurm.{key}: "):
        read(**{key: value})


@pytest.mark.parametrize(
    ("flags", "machines", "ranks"),
    [
        ({}, 1, 1),
        ({"nodes": "4"}, 4, 4),
        ({"nodes": "2", "gpus_per_node": "8"}, 2, 16),
        ({"gres": "gpu"}, 1, 1),
        ({"gres": "gpu:4"}, 1, 4),
        ({"gres": "gpu:a100:4"}, 1, 4),
        ({"gres": "ssd:1,gpu:2"}, 1, 2),
        ({"nodes": "2", "num_processes": "4"}, 2, 4),
    ],
)
def test_the_topology_follows_from_the_request(
    read: Read, flags: dict[str, str], machines: int, ranks: int
) -> None:
    read()
    found = requested(load_run(Path("c.yaml"), flags))
    assert (found.num_machines, found.num_processes) == (machines, ranks)
