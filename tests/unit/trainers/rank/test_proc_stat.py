"""The fields of /proc/PID/stat, of a process with any name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from trainers.rank.proc_stat import pids, read_stat

# PR_SET_NAME: a name with what the file uses between its fields.
NAMED = """
import ctypes, time
ctypes.CDLL(None).prctl(15, b"a) T (b 7")
print("here", flush=True)
time.sleep(600)
"""


def test_the_fields_are_those_of_the_process_whatever_its_name_is() -> None:
    argv = [sys.executable, "-c", NAMED]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"here\n"
            found = read_stat(process.pid)
            assert (found.parent, found.session) == (os.getpid(), process.pid)
            assert found.state in ("S", "R") and found.start >= read_stat(os.getpid()).start
            assert process.pid in pids()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert read_stat(process.pid).state == "T"
        finally:
            process.kill()


def test_a_process_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(OSError):
        read_stat(2**30)
