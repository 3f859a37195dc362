"""Let no process outlive the one that it works for, whatever ends that, also if it is stopped (SIGSTOP)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket

_PR_SET_PDEATHSIG = 1
# Found now: a process that was just forked must not wait for the loader's lock.
_prctl = ctypes.CDLL(None).prctl


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, even by SIGKILL (Linux).

    The parent is the thread that forked this process.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wake_for(channel: socket.socket) -> None:
    """Let the kernel continue this process, if stopped, when the other end of a socket writes or closes."""
    fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(channel, fcntl.F_SETSIG, signal.SIGCONT)
    fcntl.fcntl(channel, fcntl.F_SETFL, fcntl.fcntl(channel, fcntl.F_GETFL) | os.O_ASYNC)
