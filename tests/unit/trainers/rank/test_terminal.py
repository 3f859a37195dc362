"""Output that nobody reads is dropped, and the process continues to its own exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from terminals import Terminal

# It writes in each way that the launcher and a rank do, and once more when Python ends.
SCRIPT = """
import os, subprocess, sys
from trainers.rank.say import say
from trainers.rank.terminal import outlive_readers, write

outlive_readers()
print("first", flush=True)
sys.stdin.readline()
for _ in range(3):
    say("note", "on stdout")
    say("warning", "on stderr")
    print("no newline yet", end="")
    sys.stdout.buffer.write(b"bytes")
    sys.stdout.buffer.flush()
    write(2, b"in a signal handler")
    subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
print("x" * 1_000_000, end="")
sys.exit(7)
"""


def run(script: str = SCRIPT, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, **streams)


def pipe() -> tuple[int, Callable[[], None]]:
    ours, theirs = os.pipe()
    return theirs, lambda: os.close(ours)


def connection() -> tuple[int, Callable[[], None]]:
    ours, theirs = socket.socketpair()
    return theirs.detach(), ours.close


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as made:
        yield made


@pytest.mark.parametrize("kind", ["pipe", "connection", "terminal"])
def test_a_process_outlives_the_reader_of_its_output(kind: str, terminal: Terminal) -> None:
    made = {"pipe": pipe, "connection": connection, "terminal": lambda: (terminal.theirs, terminal.close)}
    theirs, leave = made[kind]()
    process = run(stdout=theirs, stderr=theirs)
    if kind != "terminal":
        os.close(theirs)
    leave()
    process.communicate(b"\n")
    assert process.returncode == 7


def test_only_the_stream_without_a_reader_is_dropped() -> None:
    theirs, leave = pipe()
    process = run(stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    leave()
    _, err = process.communicate(b"\n")
    assert process.returncode == 7
    assert err == b"warning: on stderr\nin a signal handler" * 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nothing_changes_for_output_that_is_read(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    plain = SCRIPT.replace("outlive_readers()\n", "")
    processes = [run(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for script in (SCRIPT, plain)]
    ours, others = [process.communicate(b"\n") for process in processes]
    assert ours == others and len(ours[0]) > 1_000_000
    assert [process.returncode for process in processes] == [7, 7]


def test_a_closed_descriptor_is_not_taken_by_a_file(tmp_path: Any) -> None:
    """`>&- 2>&-`: the next file that is opened would be stdout."""
    script = SCRIPT.replace('print("first"', f"file = open({str(tmp_path / 'file')!r}, 'w'); print('first'")
    process = run(script, preexec_fn=lambda: (os.close(1), os.close(2)))
    process.communicate(b"\n")
    assert process.returncode == 7
    assert (tmp_path / "file").read_bytes() == b""


def test_output_that_a_full_disk_loses_is_reported() -> None:
    with open("/dev/full", "w") as full:
        process = run(stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(b"\n")
    assert process.returncode == 7
    assert err.count(b"warning: stdout: No space left on device; the rest of the output is lost\n") == 1


def test_a_pipe_that_another_program_made_non_blocking_gets_all_output() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = run(stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    with open(ours, "rb") as output:
        assert output.read().count(b"x") == 1_000_000
    assert process.wait() == 7


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_exception_that_nobody_reads_keeps_its_exit_code(stream: str) -> None:
    theirs, leave = pipe()
    script = SCRIPT.replace("sys.exit(7)", "raise RuntimeError")
    process = run(script, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs})
    os.close(theirs)
    leave()
    process.communicate(b"\n")
    assert process.returncode == 1
