"""Which process may use a run's folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import lock_holder

from trainers.config.errors import ConfigError
from trainers.storage import folder_lock
from trainers.storage.folder_lock import lock_folder, lock_owner


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of the run's folder."""
    monkeypatch.setattr(folder_lock, "_held", [])  # the locks of this test end with it
    with lock_holder(tmp_path / "run") as process:
        yield process


def test_a_second_process_is_refused(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"run is in use by another run \(process {other.pid} on .*another project_na"
    ):
        lock_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"\(process {other.pid} on "):
        lock_folder(tmp_path / "run")  # a refusal does not remove the owner's name


def test_the_folder_is_free_when_its_process_has_ended(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.kill()
    other.wait()
    lock_folder(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_on_a_file_system_without_locks_only_local_processes_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """flock fails in this way on Lustre that is mounted without locks."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock_folder(tmp_path / "run")
    assert (
        "run cannot be locked (Function not implemented); do not start a second run in it"
        in capsys.readouterr().out
    )
    assert lock_owner(tmp_path / "run") == (os.getpid(), socket.gethostname())
    (tmp_path / "run" / ".lock").write_text("process 1 on another\n")
    assert lock_owner(tmp_path / "run") is None, "this machine cannot know whether that process is alive"


def test_another_folder_is_free(other: subprocess.Popen[str], tmp_path: Path) -> None:
    lock_folder(tmp_path / "second")


def test_the_folder_is_in_use_also_without_the_file_of_the_lock(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    """`rm my-run/.lock` must not let a second run in, now or at a later start."""
    run = tmp_path / "run"
    (run / ".lock").unlink()
    assert lock_owner(run) == (0, "")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"in use by another run \(another process; its \.lock was re"):
            lock_folder(run)
    other.kill()
    other.wait()
    assert lock_owner(run) is None
    lock_folder(run)


def test_where_only_files_can_be_locked_the_file_decides(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks no folder that is open for reading."""
    flock = fcntl.flock

    def only_files(file: object, kind: int) -> None:
        if isinstance(file, int):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", only_files)
    with pytest.raises(ConfigError, match=rf"\(process {other.pid} on "):
        lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "second")
