"""Locks of torch's compiler: those that a killed process left are removed, those in use are not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from launcher.supervise.stale_locks import OLD, extensions_cache, remove_stale_locks


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "py311_cpu" / "an_operator" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_that_was_left_since_the_start_is_removed(tmp_path, lock):
    assert remove_stale_locks(tmp_path, time.time() - 60) == [lock]
    assert not lock.exists()


def test_an_earlier_lock_stays_because_another_machine_may_hold_it(tmp_path, lock):
    assert remove_stale_locks(tmp_path, time.time() + 60) == []
    assert lock.exists()


def test_an_old_lock_is_removed(tmp_path, lock):
    os.utime(lock, (time.time() - OLD - 1,) * 2)
    assert remove_stale_locks(tmp_path, time.time() + 60) == [lock]


def test_a_lock_that_a_process_holds_stays(tmp_path, lock):
    code = f"import sys; f = open({str(lock)!r}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        assert remove_stale_locks(tmp_path, time.time() - 60) == []
        holder.stdin.close()
    assert remove_stale_locks(tmp_path, time.time() - 60) == [lock]


def test_the_cache_is_where_torch_looks(monkeypatch, tmp_path):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = _get_build_directory("an_operator", verbose=False)
    assert folder.startswith(str(extensions_cache(os.environ)))
