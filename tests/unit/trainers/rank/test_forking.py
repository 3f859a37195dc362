"""The process that forks ranks. With real ranks: tests/distributed/test_warm.py."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from trainers.rank.forking import Parent


def test_without_memory_there_is_no_spare_and_the_ranks_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", refuse)
    ours, launcher = socket.socketpair()
    with ours, launcher:
        parent = Parent(ours, None, {}, spares=True)
        assert parent._fork_spare() is None and parent.spare is None
        launcher.setblocking(False)
        with pytest.raises(BlockingIOError):
            launcher.recv(1)
    assert "no spare: [Errno 12] Cannot allocate memory" in capsys.readouterr().out
