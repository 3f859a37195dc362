"""A terminal that a test can type into and take away, and a process in its foreground."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import threading
from collections.abc import Sequence
from typing import Any

from processes import PATIENCE, wait_for

INTERRUPT = b"\x03"  # Ctrl-C


class Terminal:
    """A pseudo-terminal. What is written to it is in `shown`."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.shown = b""
        self.stop, self.stopped = os.pipe()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        while self.stop not in select.select([self.ours, self.stop], [], [])[0]:
            try:
                self.shown += os.read(self.ours, 1 << 16)
            except OSError:  # every process has closed it
                return

    def start(self, argv: Sequence[str], nohup: bool = False, **more: Any) -> subprocess.Popen[str]:
        """Start a process that leads a session with this terminal, and that is in its foreground.

        Its signals have their defaults. `nohup`: SIGHUP is ignored.
        """

        def take() -> None:
            os.setsid()
            fcntl.ioctl(self.theirs, termios.TIOCSCTTY, 0)
            for number in (signal.SIGINT, signal.SIGQUIT):  # which a shell's & ignores
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

        streams = {"stdin": self.theirs, "stdout": self.theirs, "stderr": self.theirs}
        return subprocess.Popen(argv, text=True, preexec_fn=take, **{**streams, **more})

    def wait_for(self, text: str, patience: float = PATIENCE) -> None:
        wait_for(lambda: text.encode() in self.shown, patience)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def close(self) -> None:
        """Take the terminal away: the kernel sends SIGHUP to the session, and every write is an error."""
        if self.reader.is_alive():
            os.write(self.stopped, b"x")
        self.reader.join()
        if self.ours >= 0:
            os.close(self.theirs)
            os.close(self.ours)
            self.ours = -1

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for number in (self.stop, self.stopped):
            os.close(number)
