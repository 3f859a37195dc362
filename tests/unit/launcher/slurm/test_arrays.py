"""Job arrays: each line of a file, or each number of sbatch's list, is a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import Submitted

from launcher.cli import main
from launcher.commands.submit import ARRAY
from launcher.slurm.journal import jobs
from launcher.slurm.request import TRAIN


def config_of(name: str) -> str:
    """Return the config for a run with another name."""
    return Path("c.yaml").read_text().replace("project_name: run", f"project_name: {name}")


def test_each_line_of_a_file_is_a_run(submitted: Submitted, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.txt").write_text("--lr 1e-4 --project-name low\n--lr 1e-3 --project-name high\n\n")
    assert main(["submit", "c.yaml", "--array", "sweep.txt", "--epochs", "2"]) == 0
    (argv,) = submitted()
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
    submitted: Submitted, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    Path("sweep.txt").write_bytes(text.encode("latin-1" if "é" in text else "utf-8"))
    assert main(["submit", "c.yaml", "--array", "sweep.txt"]) == 2
    assert words in capsys.readouterr().err
    assert submitted() == []


def test_lines_may_begin_with_their_own_config(submitted: Submitted) -> None:
    Path("other.yaml").write_text(config_of("other"))
    Path("sweep.txt").write_text("c.yaml --lr 1e-4\nother.yaml\n")
    assert main(["submit", "--array", "sweep.txt%1", "--epochs", "2"]) == 0
    (argv,) = submitted()
    assert "--array=1-2%1" in argv and "--job-name=sweep" in argv
    assert argv[argv.index(str(ARRAY)) :] == [str(ARRAY), "sweep.txt", "--epochs=2"]
    assert jobs(Path("run")) == ["4711_1"] and jobs(Path("other")) == ["4711_2"]


def test_each_number_of_sbatchs_list_is_a_run(submitted: Submitted) -> None:
    Path("c.yaml").write_text(config_of("run-${SLURM_ARRAY_TASK_ID}"))
    assert main(["submit", "c.yaml", "--array", "1,4-8:2%2", "--parsable"]) == 0
    (argv,) = submitted()
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
    submitted: Submitted, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    Path("other.yaml").write_text(config_of("other").replace("gpu", "cpu"))
    Path("two.txt").write_text("c.yaml\nother.yaml\n")
    Path("lines.txt").write_text("--lr 1e-4\n")
    assert main(["submit", *argv]) == 2
    assert words in capsys.readouterr().err
    assert submitted() == []
