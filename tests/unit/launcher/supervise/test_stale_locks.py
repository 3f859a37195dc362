"""Locks of torch's compiler: that of a build that has ended is removed at once, of a living one never."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import wait_for
from users import BECOME, needs_root

from launcher.supervise import stale_locks
from launcher.supervise.stale_locks import OLD, extensions_cache, file_system, remove_stale_locks
from trainers.rank.build_lock import this_process

# Takes the lock as torch does: it keeps the file open. A rank also writes which process it is. A compiler, if
# there is one, works in the folder of the lock.
BUILDER = """
import os, json, subprocess, sys
from pathlib import Path
from trainers.rank.build_lock import this_process

lock, who = Path(sys.argv[1]), sys.argv[2]
number = os.open(lock, os.O_CREAT | os.O_EXCL)
if who == "rank":
    lock.write_text(json.dumps(this_process()))
if who == "with a compiler":
    compiler = subprocess.Popen(["sleep", "600"], cwd=lock.parent, stdout=subprocess.DEVNULL)
    print(compiler.pid, flush=True)
else:
    print(0, flush=True)
if who == "another user":
    become_another_user()
sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cpu" / "an_operator" / "lock"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is on a file system that other machines have too."""
    monkeypatch.setattr(stale_locks, "file_system", lambda folder: "nfs4")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def build(lock: Path) -> Iterator[Start]:
    """`build(who)` starts a process that builds. Its `compiler` is the pid of the compiler, or 0."""
    started: list[subprocess.Popen[str]] = []

    def start(who: str = "a script", *before: str) -> subprocess.Popen[str]:
        argv = [*before, sys.executable, "-c", BECOME + BUILDER, str(lock), who]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        process.compiler = int(process.stdout.readline())  # type: ignore[attr-defined]
        return process

    yield start
    for process in started:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def make_old(lock: Path) -> None:
    os.utime(lock, (time.time() - OLD - 1,) * 2)


def test_the_lock_of_a_killed_builder_is_removed_at_once(tmp_path: Path, lock: Path, build: Start) -> None:
    end(build())
    assert lock.exists()
    assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


@pytest.mark.parametrize("who", ["a script", "rank"])
def test_the_lock_of_a_living_builder_stays_however_old_it_is(
    tmp_path: Path, lock: Path, build: Start, who: str
) -> None:
    builder = build(who)
    assert remove_stale_locks(tmp_path) == []
    make_old(lock)
    assert remove_stale_locks(tmp_path) == []
    end(builder)
    assert remove_stale_locks(tmp_path) == [lock]


def test_a_lock_stays_while_a_compiler_of_a_killed_builder_works(
    tmp_path: Path, lock: Path, build: Start
) -> None:
    builder = build("with a compiler")
    end(builder)
    try:
        make_old(lock)
        assert remove_stale_locks(tmp_path) == []
    finally:
        os.kill(builder.compiler, 9)  # type: ignore[attr-defined]
    wait_for(lambda: remove_stale_locks(tmp_path) == [lock])


@needs_root
def test_the_lock_of_a_living_builder_of_another_user_stays(tmp_path: Path, lock: Path, build: Start) -> None:
    build("another user")
    make_old(lock)
    assert remove_stale_locks(tmp_path) == []


@needs_root
def test_the_lock_of_a_living_builder_in_a_container_stays(tmp_path: Path, lock: Path, build: Start) -> None:
    """Its process ids are others, and its files may have other paths."""
    enter = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("containers cannot be made here")
    build("rank", *enter)
    make_old(lock)
    assert remove_stale_locks(tmp_path) == []


def test_a_builder_that_releases_its_lock_is_not_disturbed(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch closes the file, then removes it, and fails if it is gone. A new builder may take it at once."""
    lock.touch()
    holders = []

    def meanwhile(seconds: float) -> None:
        lock.unlink()
        holders.append(lock.open("x"))

    monkeypatch.setattr(stale_locks.time, "sleep", meanwhile)
    assert remove_stale_locks(tmp_path) == []
    assert lock.exists()
    holders[0].close()


@pytest.mark.usefixtures("network")
def test_on_a_network_file_system_the_owner_in_the_lock_counts(
    tmp_path: Path, lock: Path, build: Start
) -> None:
    builder = build("rank")
    make_old(lock)
    assert remove_stale_locks(tmp_path) == []
    lock.touch()
    end(builder)
    assert remove_stale_locks(tmp_path) == [lock]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("owner", ["", "{", "[]", "another machine"])
def test_on_a_network_file_system_a_lock_that_another_machine_may_hold_stays_until_it_is_old(
    tmp_path: Path, lock: Path, owner: str
) -> None:
    elsewhere = json.dumps({**this_process(), "boot": "another"})
    lock.write_text(elsewhere if owner == "another machine" else owner)
    assert remove_stale_locks(tmp_path) == []
    make_old(lock)
    assert remove_stale_locks(tmp_path) == [lock]


@pytest.mark.usefixtures("network")
def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path: Path, lock: Path) -> None:
    lock.write_text(json.dumps(this_process()))
    assert remove_stale_locks(tmp_path) == []
    lock.write_text(json.dumps({**this_process(), "start": 1}))
    assert remove_stale_locks(tmp_path) == [lock]


@pytest.mark.usefixtures("network")
def test_an_old_lock_that_a_script_of_this_machine_holds_stays(
    tmp_path: Path, lock: Path, build: Start
) -> None:
    builder = build()
    make_old(lock)
    assert remove_stale_locks(tmp_path) == []
    end(builder)
    assert remove_stale_locks(tmp_path) == [lock]


def test_a_file_system_that_this_machine_exports_is_one_of_the_network(
    tmp_path: Path, lock: Path, build: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(build())
    exports = tmp_path / "etab"
    exports.write_text(f"{tmp_path}\t*(rw,sync)\n")
    monkeypatch.setattr(stale_locks, "EXPORTS", exports)
    assert remove_stale_locks(tmp_path) == []
    exports.write_text("/srv/other\t*(rw,sync)\n")
    assert remove_stale_locks(tmp_path) == [lock]


def test_the_file_system_is_that_of_the_innermost_mount() -> None:
    assert (file_system(Path("/proc/self")), file_system(Path("/sys"))) == ("proc", "sysfs")


def test_the_cache_is_where_torch_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = _get_build_directory("an_operator", verbose=False)
    assert folder.startswith(str(extensions_cache(os.environ)))
