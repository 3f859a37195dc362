"""What a process writes to a terminal, a pipe or a file that takes no more is dropped; the process continues.

`phalanx train config.yaml | tee log` loses tee at Ctrl-C, and a lost ssh takes the terminal away. Python
would raise an error at the next line, or at its end when it flushes, and so end a run for nothing.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys

# Without a reader a pipe has EPIPE, a socket ECONNRESET, and a terminal that hung up EIO.
_GONE = (errno.EPIPE, errno.ECONNRESET)
STDOUT, STDERR = 1, 2
_NAMES = {STDOUT: "stdout", STDERR: "stderr"}
_dropped: dict[int, bool] = {}  # descriptor -> whether somebody could have read it: its disk is full


class _Output(io.FileIO):
    """The file of stdout or stderr, whose write() raises no error."""

    def write(self, data: object) -> int:
        rest = memoryview(data)  # type: ignore[arg-type]  # a buffer, as io.RawIOBase has it
        size = len(rest)
        while rest:  # with python -u nothing else writes what a full pipe has not taken
            rest = rest[write(self.fileno(), rest) :]
        return size


def outlive_readers() -> None:
    """Let stdout and stderr drop what nobody can read. A stream that was replaced before stays as it is.

    If a descriptor is closed (`>&-`), it gets /dev/null: else the next file that is opened would be stdout.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(null)
    for number, name in _NAMES.items():
        old: io.TextIOWrapper | None = getattr(sys, name)
        if old is not None and old is not getattr(sys, f"__{name}__"):
            continue
        raw = _Output(number, "w", closefd=False)
        if old is None:
            stream = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", line_buffering=True)
        else:
            old.flush()
            buffer = raw if isinstance(old.buffer, io.RawIOBase) else io.BufferedWriter(raw)  # raw: python -u
            stream = io.TextIOWrapper(
                buffer,  # type: ignore[arg-type]  # Python itself gives it a raw file too
                old.encoding,
                old.errors,
                line_buffering=old.line_buffering,
                write_through=old.write_through,
            )
        setattr(sys, name, stream)


def write(number: int, data: bytes | memoryview) -> int:
    """Write as os.write() does, also in a signal handler. From the first error on, drop the data.

    A reader that is gone is no loss. Another error, such as a full disk, is reported on stderr.
    """
    while True:
        try:
            return os.write(number, data)
        except BlockingIOError:  # a program that shares the terminal has made it non-blocking
            select.select((), (number,), ())
        except OSError as error:
            terminal = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(number).st_mode)
            lost = error.errno not in _GONE and not terminal
            _drop(number, lost)
            if lost:
                line = f"warning: {_NAMES[number]}: {error.strerror}; the rest of the output is lost\n"
                write(STDERR, line.encode())
            return len(data)


def _drop(number: int, lost: bool) -> None:
    """Replace the descriptor by /dev/null, also for libraries and child processes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
    _dropped[number] = lost


def has_lost_output() -> bool:
    """Write what is buffered, and return whether somebody misses a part of the output."""
    for name in _NAMES.values():
        getattr(sys, name).flush()
    return any(_dropped.values())


def is_unread(number: int = STDOUT) -> bool:
    """Return whether nobody can read what this process writes to a descriptor."""
    if number in _dropped:
        return True
    poll = select.poll()
    poll.register(number, 0)  # errors only: a pipe whose reader is gone, a terminal that hung up
    return bool(poll.poll(0))
