"""`phalanx submit`: what it checks on the login node, and what it gives to sbatch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from fake_slurm import Submitted

from launcher.cli import main
from launcher.config import load_run
from launcher.slurm.journal import jobs
from launcher.slurm.request import TRAIN, requested


def test_sbatch_gets_its_flags_and_the_script_gets_the_others(
    submitted: Submitted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["submit", "c.yaml", "--nodes", "2", "--gpus-per-node", "8", "--lr", "1e-4", "--parsable"]) == 0
    )
    assert capsys.readouterr().out == "4711\n"
    (argv,) = submitted()
    flags = ["--parsable", "--nodes=2", "--gpus-per-node=8", "--partition=gpu", "--job-name=run"]
    assert sorted(argv[:6]) == sorted([*flags, str(TRAIN)])
    assert argv[5:] == [str(TRAIN), "c.yaml", "--lr=1e-4"]
    assert jobs(Path("run")) == ["4711"]


def test_a_dry_run_submits_nothing(submitted: Submitted, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "c.yaml", "--time", "1:00:00", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "sbatch" and "--time=1:00:00" in words
    assert submitted() == [] and not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "fast"], "lr: 'fast' is not a number"),
        (["--data-path", "./nowhere"], "nowhere"),
        (["--base-model", "./none"], "base_model: the folder ./none does not exist"),
        (["--nodes", "2", "--num-processes", "3"], "3 ranks cannot be placed on 2 nodes"),
        (["--gres", "gpu:2", "--num-processes", "4"], "4 ranks cannot be placed on 1 node with 2 GPUs each"),
        (["--gpus-per-node", "1", "--num-processes", "2"], "1 node with 1 GPU each. Allowed: up to 1."),
        (["--gpus-per-node", "1", "--nodes", "2", "--num-processes", "3"], "a multiple of 2 up to 2."),
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
    submitted: Submitted, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    try:
        code = main(["submit", "c.yaml", *flags])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err
    assert submitted() == []


def test_an_error_of_sbatch_is_printed(
    submitted: Submitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    )
    assert main(["submit", "c.yaml"]) == 2
    assert capsys.readouterr().err == "error: sbatch: error: invalid partition\n"
    assert not Path("run").exists()


def test_without_slurm_the_error_names_sbatch(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "c.yaml"]) == 2
    assert "sbatch: " in capsys.readouterr().err


def test_submit_imports_nothing_heavy(submitted: Submitted) -> None:
    import subprocess

    code = (
        "import sys; from launcher.cli import main;"
        "main(['submit', 'c.yaml', '--gpus-per-node', '8', '--dry-run']);"
        "sys.exit(bool({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_1024_nodes_with_eight_gpus_each(submitted: Submitted) -> None:
    assert main(["submit", "c.yaml", "--nodes", "1024", "--gpus-per-node", "8", "--dry-run"]) == 0
    assert requested(load_run(Path("c.yaml"), {"nodes": "1024", "gpus_per_node": "8"})).num_processes == 8192


def test_the_folder_of_a_waiting_job_is_free(
    submitted: Submitted, capsys: pytest.CaptureFixture[str]
) -> None:
    """What submit writes there is not a run: a second submission is accepted, and --resume is refused."""
    for _ in range(2):
        assert main(["submit", "c.yaml"]) == 0
    assert main(["submit", "c.yaml", "--resume"]) == 2
    assert "there is no run in run" in capsys.readouterr().err
