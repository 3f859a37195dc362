"""The cache of prepared data: one process creates an entry once, and it is complete or missing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainers.config.errors import ConfigError
from trainers.rank.protocol import WAITS
from trainers.storage import data_cache
from trainers.storage.data_cache import (
    cache_root,
    make_once,
    mark_prepared,
    scratch,
    wait_for_machine_0,
)


def fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "data").write_text("complete")


def test_parallel_callers_create_an_entry_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)
        fill(folder)

    threads = [threading.Thread(target=make_once, args=(tmp_path / "key", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.lock"}


def test_the_entry_of_a_faster_node_is_kept(tmp_path: Path) -> None:
    """This happens if the file system has no locks between nodes."""

    def make(folder: Path) -> None:
        fill(folder)
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "data").write_text("the other's")

    make_once(tmp_path / "key", make)
    assert (tmp_path / "key" / "data").read_text() == "the other's"
    assert not list(tmp_path.glob("*.part"))


def test_only_the_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    names = {
        "dead": f"key.{here}.{gone.pid}.part",
        "alive": f"key.{here}.{os.getppid()}.part",
        "elsewhere": "key.node7.example.org.12.part",
        "long ago": "key.node8.13.part",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    os.utime(tmp_path / names["long ago"], (0, 0))
    make_once(tmp_path / "key", fill)
    left = {name for name, path in names.items() if (tmp_path / path).exists()}
    assert left == {"alive", "elsewhere"}


def test_after_a_failure_the_entry_is_created_again(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        folder.mkdir()
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        make_once(tmp_path / "key", fails)
    assert not (tmp_path / "key").exists()
    make_once(tmp_path / "key", fill)
    assert (tmp_path / "key" / "data").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda entry: flip(entry / "data"), "data has changed since it was written"),
    "cut": (lambda entry: os.truncate(entry / "data", 3), "data has 3 bytes instead of 8"),
    "missing": (lambda entry: (entry / "data").unlink(), "data is missing"),
    "of an earlier version": (lambda entry: (entry / "files.json").unlink(), "it has no files.json"),
    "cut hashes": (lambda entry: os.truncate(entry / "files.json", 9), "its files.json cannot be read"),
    "nested": (lambda entry: (entry / "files.json").write_text("[" * 100_000), "files.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, why = DAMAGE[kind]
    entry = tmp_path / "key"
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        fill(folder)

    make_once(entry, make)
    make_once(entry, make)
    assert len(made) == 1 and not capsys.readouterr().err
    damage(entry)
    threads = [threading.Thread(target=make_once, args=(entry, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2, "one process makes it, the others use what it made"
    assert (entry / "data").read_text() == "complete"
    lines = capsys.readouterr().err.splitlines()
    assert f"warning: the prepared data in {entry} is damaged: " in lines[0] and why in "".join(lines)
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.lock"}


def test_a_cache_that_cannot_be_created_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"PHALANX_CACHE: .*file/data cannot be created: Not a directory"):
        cache_root()


def test_the_ranks_of_another_machine_wait_for_machine_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_cache, "LOOK_SECONDS", 0.01)
    for name in ("machine-0", "machine-1"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PHALANX_LOG_DIR", str(tmp_path / "machine-1"))
    wait_for_machine_0()  # this machine has its own cache
    monkeypatch.setenv(WAITS, "1")
    waits = threading.Thread(target=wait_for_machine_0)
    waits.start()
    waits.join(0.1)
    assert waits.is_alive()
    mark_prepared()  # as rank 0 does; both machines have the same attempt folder
    waits.join(10)
    assert not waits.is_alive()


def test_an_entry_is_created_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock fails in this way on Lustre that is mounted without locks."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    make_once(tmp_path / "key", fill)
    assert (tmp_path / "key" / "data").exists()


def test_a_scratch_folder_goes_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = tmp_path / "data" / f"rows.{socket.gethostname()}.{ended.pid}.part"
    left.mkdir(parents=True)
    with scratch("rows") as folder:
        folder.mkdir()
        (folder / "a").touch()
        assert not left.exists(), "a killed process has left it"
    with pytest.raises(ValueError), scratch("rows") as folder:
        folder.mkdir()
        raise ValueError
    with (
        pytest.raises(OSError, match=r"the prepared data needs about 5\.0 GB"),
        scratch("rows", 5 * 10**9),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list((tmp_path / "data").iterdir()) == []
