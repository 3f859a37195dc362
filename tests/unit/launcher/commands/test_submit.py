"""`phalanx submit`: what it checks on the login node, and what it gives to sbatch."""

from __future__ import annotations

import json
import shlex
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands.submit import ARRAY
from launcher.config import load_run
from launcher.slurm.journal import jobs, note, started, starts_without_progress
from launcher.slurm.request import TRAIN, requested

BASE = """\
task: llm-sft
base_model: model
project_name: run
data: {path: data}
launch: {}
slurm:
  partition: gpu
"""


@pytest.fixture
def asked(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Put a stub of sbatch first on the PATH. asked() returns the arguments of each call."""
    Path("c.yaml").write_text(BASE)
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'asked')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "print('4711;main')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    log = tmp_path / "asked"
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


Asked = Callable[[], list[list[str]]]


def test_sbatch_gets_its_flags_and_the_script_gets_the_others(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["submit", "c.yaml", "--nodes", "2", "--gpus-per-node", "8", "--lr", "1e-4", "--parsable"]) == 0
    )
    assert capsys.readouterr().out == "4711\n"
    (argv,) = asked()
    flags = ["--parsable", "--nodes=2", "--gpus-per-node=8", "--partition=gpu", "--job-name=run"]
    assert sorted(argv[:6]) == sorted([*flags, str(TRAIN)])
    assert argv[5:] == [str(TRAIN), "c.yaml", "--lr=1e-4"]
    assert jobs(Path("run")) == ["4711"]


def test_a_dry_run_submits_nothing(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "c.yaml", "--time", "1:00:00", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "sbatch" and "--time=1:00:00" in words
    assert asked() == [] and not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "fast"], "lr: 'fast' is not a number"),
        (["--data-path", "./nowhere"], "nowhere"),
        (["--base-model", "./none"], "base_model: the folder ./none does not exist"),
        (["--nodes", "2", "--num-processes", "3"], "3 ranks cannot be placed on 2 nodes"),
        (["--gres", "gpu:2", "--num-processes", "4"], "4 ranks cannot be placed on 1 node with 2 GPUs each"),
        (["--nodes", "2", "--num-machines", "4"], "4 differs from slurm.nodes (2)"),
        (["--partition", "gpu --wrap=id"], "partition: 'gpu --wrap=id' has a character"),
        (["--machine-rank", "0"], "launch.machine_rank: it is for machines without SLURM"),
        (["--main-process-ip", "node1"], "launch.main_process_ip: it is for machines without SLURM"),
        (["--token", "hf_secret"], "--token: everybody could read it in the job's command"),
        (["--comment", "a"], "unrecognized arguments: --comment"),
        (["--project-name", "a\nb"], "control characters"),
        (["--model-ref", "a\nb"], "control characters"),
    ],
)
def test_a_mistake_is_found_before_sbatch_is_called(
    asked: Asked, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    try:
        code = main(["submit", "c.yaml", *flags])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err
    assert asked() == []


def test_an_error_of_sbatch_is_printed(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    )
    assert main(["submit", "c.yaml"]) == 2
    assert capsys.readouterr().err == "error: sbatch: error: invalid partition\n"
    assert not Path("run").exists()


def test_without_slurm_the_error_names_sbatch(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "c.yaml"]) == 2
    assert "sbatch: " in capsys.readouterr().err


def test_submit_imports_nothing_heavy(asked: Asked) -> None:
    import subprocess

    code = (
        "import sys; from launcher.cli import main;"
        "main(['submit', 'c.yaml', '--gpus-per-node', '8', '--dry-run']);"
        "sys.exit(bool({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_each_line_of_a_file_is_a_run(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.txt").write_text("--lr 1e-4 --project-name low\n--lr 1e-3 --project-name high\n\n")
    assert main(["submit", "c.yaml", "--array", "sweep.txt", "--epochs", "2"]) == 0
    (argv,) = asked()
    assert "--array=1-2" in argv
    assert argv[argv.index(str(ARRAY)) :] == [str(ARRAY), "sweep.txt", "c.yaml", "--epochs=2"]
    assert jobs(Path("low")) == ["4711_1"] and jobs(Path("high")) == ["4711_2"]
    assert capsys.readouterr().out == "job 4711: low, high\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--lr fast --project-name a", "sweep.txt:1: flag --lr"),
        ("--project-name a\n--project-name a", "two tasks have the same project_name, a"),
        ("--project-name a\nlr 2", "sweep.txt:2: 'lr 2' is not a list of `--flag value`"),
        (
            "--project-name a\nc.yaml --lr 2",
            "sweep.txt:2: c.yaml: the command names a config already, c.yaml",
        ),
        ("--project-name a --nodes 2", "sweep.txt:1: nodes applies to all tasks"),
        ("--project-name a --token hf_x", "sweep.txt:1: --token: everybody could read it"),
        ("--project-name a\r\n--project-name b\r\n", "sweep.txt:1: the line has control characters"),
        ("--project-name a\n--project-name\u2028b", "sweep.txt:2: the line has control characters"),
        ("--project-name a --data-path -x", "sweep.txt:1: -x would be read as a flag"),
        ("--project-name a\n-x.yaml --lr 2", "sweep.txt:2: '-x.yaml --lr 2' is not a list"),
        ("--project-name $(id)", "sweep.txt:1: '$(id)' has a character that is not allowed"),
        ("--project-name a --lr", "sweep.txt:1: "),
        ("--project-name é", "sweep.txt is not UTF-8 text"),
        ("\n\n", "has no lines"),
    ],
)
def test_malformed_lines_are_refused(
    asked: Asked, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    Path("sweep.txt").write_bytes(text.encode("latin-1" if "é" in text else "utf-8"))
    assert main(["submit", "c.yaml", "--array", "sweep.txt"]) == 2
    assert words in capsys.readouterr().err
    assert asked() == []


def test_lines_may_begin_with_their_own_config(asked: Asked) -> None:
    Path("other.yaml").write_text(BASE.replace("project_name: run", "project_name: other"))
    Path("sweep.txt").write_text("c.yaml --lr 1e-4\nother.yaml\n")
    assert main(["submit", "--array", "sweep.txt%1", "--epochs", "2"]) == 0
    (argv,) = asked()
    assert "--array=1-2%1" in argv and "--job-name=sweep" in argv
    assert argv[argv.index(str(ARRAY)) :] == [str(ARRAY), "sweep.txt", "--epochs=2"]
    assert jobs(Path("run")) == ["4711_1"] and jobs(Path("other")) == ["4711_2"]


def test_each_number_of_sbatchs_list_is_a_run(asked: Asked) -> None:
    Path("c.yaml").write_text(BASE.replace("project_name: run", "project_name: run-${SLURM_ARRAY_TASK_ID}"))
    assert main(["submit", "c.yaml", "--array", "1,4-8:2%2", "--parsable"]) == 0
    (argv,) = asked()
    assert "--array=1,4-8:2%2" in argv and "--job-name=c" in argv
    assert argv[argv.index(str(TRAIN)) :] == [str(TRAIN), "c.yaml"]
    assert sorted(path.name for path in Path().glob("run-*")) == ["run-1", "run-4", "run-6", "run-8"]
    assert jobs(Path("run-6")) == ["4711_6"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "submit: no config"),
        (["--array", "1-3"], "submit: no config"),
        (
            ["c.yaml", "--array", "1-3"],
            "two tasks have the same project_name, run. Write ${SLURM_ARRAY_TASK_ID}",
        ),
        (["c.yaml", "--array", "1-999999999"], "not a range of at most 10000 tasks"),
        (["c.yaml", "--array", "3-1"], "--array=3-1 has no task"),
        (["c.yaml", "--array", "1-9:0"], "not a range of at most"),
        (["c.yaml", "--array", "1-3", "--lr", "fast"], "SLURM_ARRAY_TASK_ID=1: flag --lr"),
        (["c.yaml", "--array", "lines.txt%x"], "'x' is not a number of tasks that run at a time"),
        (["--array", "lines.txt"], "lines.txt:1: no config. Begin the line with a config"),
        (["c.yaml", "--array", "nowhere.txt"], "--array: nowhere.txt: No such file"),
        (["--array", "two.txt"], "two.txt: the tasks have different slurm settings"),
    ],
)
def test_malformed_arrays_are_refused(
    asked: Asked, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    Path("other.yaml").write_text(BASE.replace("run", "other").replace("gpu", "cpu"))
    Path("two.txt").write_text("c.yaml\nother.yaml\n")
    Path("lines.txt").write_text("--lr 1e-4\n")
    assert main(["submit", *argv]) == 2
    assert words in capsys.readouterr().err
    assert asked() == []


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
    asked: Asked, flags: dict[str, str], machines: int, ranks: int
) -> None:
    found = requested(load_run(Path("c.yaml"), flags))
    assert (found.num_machines, found.num_processes) == (machines, ranks)


def test_1024_nodes_with_eight_gpus_each(asked: Asked) -> None:
    assert main(["submit", "c.yaml", "--nodes", "1024", "--gpus-per-node", "8", "--dry-run"]) == 0
    assert requested(load_run(Path("c.yaml"), {"nodes": "1024", "gpus_per_node": "8"})).num_processes == 8192


def test_the_job_that_was_submitted_or_started_last_is_the_last(work: Path) -> None:
    """A job that starts comes after a job that was submitted to follow it."""
    for job, step in (("1", None), ("2", None), ("1", 0)):
        note(Path("run"), job, step)
    assert jobs(Path("run")) == ["2", "1"]
    assert started(Path("run"), "1") and not started(Path("run"), "2")
    with Path("run/launch/jobs.jsonl").open("a") as file:
        file.write('{"job": "3", "ti\n')  # two machines wrote at the same time, on a network file system
    assert jobs(Path("run")) == ["2", "1"]


@pytest.mark.parametrize(
    ("steps", "without_progress"),
    [([0], 0), ([0, 0], 1), ([0, 0, 0, 0], 3), ([0, 0, 0, 4], 0), ([0, 4, 4, 4], 2), ([4, 4, 0], 0)],
)
def test_starts_without_progress_are_counted(work: Path, steps: list[int], without_progress: int) -> None:
    """Only starts of the same job count: a user has submitted the other one."""
    for job in ("1", "2"):
        note(Path("run"), job)
        for restart, step in enumerate(steps):
            note(Path("run"), job, step, restart)
        assert starts_without_progress(Path("run"), job) == without_progress


def test_several_runs_in_one_start_of_a_job_are_not_restarts(work: Path) -> None:
    """This happens in an interactive job."""
    for _ in range(5):
        note(Path("run"), "1", 0)
    assert starts_without_progress(Path("run"), "1") == 0


def test_the_folder_of_a_waiting_job_is_free(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """What submit writes there is not a run: a second submission is accepted, and --resume is refused."""
    for _ in range(2):
        assert main(["submit", "c.yaml"]) == 0
    assert main(["submit", "c.yaml", "--resume"]) == 2
    assert "there is no run in run" in capsys.readouterr().err
