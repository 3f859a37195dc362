"""A path that the system refuses is one line and an exit code, whichever command was given it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from fakes import run_command

from trainers import push
from trainers.config.errors import DISK_FAILED, USAGE_ERROR

LONG = "x" * 300


@pytest.mark.parametrize(
    "argv",
    [
        ["status", LONG],
        ["evaluate", LONG],
        ["show", "c.yaml", "--base-model", f"./{LONG}"],
        ["show", "c.yaml", "--data-path", f"./{LONG}"],
        ["train", "c.yaml", "--project-name", LONG],
    ],
    ids=lambda argv: " ".join(argv).replace(LONG, "LONG"),
)
@pytest.mark.usefixtures("no_slurm")
def test_a_name_that_is_too_long(
    config: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(argv, monkeypatch) == USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "xxx...: File name too long. Give a shorter name" in line


@pytest.mark.usefixtures("no_slurm")
def test_a_hub_id_that_is_too_long(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["show", "c.yaml", "--base-model", f"org/{LONG[:97]}"], monkeypatch) == USAGE_ERROR
    assert "base_model: there is no folder org/xxx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EROFS, DISK_FAILED), (errno.EACCES, USAGE_ERROR)], ids=["read-only", "denied"]
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kernel names only the last part of a path below a folder; the line names all of it."""

    def refuse(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT and dir_fd is not None:
            raise OSError(number, os.strerror(number), path)
        return open_(path, flags, *rest, dir_fd=dir_fd)

    open_ = os.open
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(os, "open", refuse)
    assert push.main([str(tmp_path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/.lock: {os.strerror(number)}. Give a folder")
