"""The launcher's side of trainers/warm.py, which imports the libraries once and forks the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.supervise.hangs import IDLE
from launcher.supervise.progress import Progress
from trainers.config.errors import ConfigError
from trainers.rank import no_links
from trainers.rank.import_environment import read_by_imports
from trainers.rank.inherited import inherited
from trainers.rank.outliving import die_with_parent
from trainers.rank.private_socket import connect
from trainers.rank.proc_stat import read_stat, watch
from trainers.rank.protocol import WARM
from trainers.rank.say import say

ANSWER_SECONDS = 60.0  # for a kept process to serve this run: it only forks, and the machine may be busy


class Refused(Exception):
    """The ranks cannot be forked; the message says why."""


class NotNeeded(Exception):
    """The ranks are not needed any more."""


class Spare:
    """A fork of the process that forks the ranks. It waits to take over, and ends with this launcher."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection, self.pid, self.watched = connection, pid, watch(pid)

    @property
    def lives(self) -> bool:
        return self.watched is not None and not select.select([self.watched], [], [], 0)[0]

    def end(self) -> None:
        """Kill the process, and wait until it has ended."""
        self.connection.close()
        if self.watched is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(self.watched, signal.SIGKILL)
            select.select([self.watched], [], [])
            os.close(self.watched)
            self.watched = None


class WarmParent:
    """A connection to the process that forks the ranks.

    The process begins its imports when this object is created. start() waits until they are done. Once it has
    forked ranks, it has a spare: take_over() continues with it.
    """

    def __init__(
        self, module: str, deepspeed: bool, environ: Mapping[str, str], log: Path, locks: list[int]
    ) -> None:
        """Start the process, or join the one that is kept for several runs.

        The process inherits `locks`, the descriptors of the lock on the run's folder, which is free when all
        its holders have ended.
        """
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0  # of the process that forks; 0: not known yet
        self.spare: Spare | None = None
        self.serving: Spare | None = None  # the spare that has taken over from the process
        self.descriptors: list[int] = []  # received, and not assigned to a message yet
        self.buffer, self.imported, self.ended = b"", False, False
        kept = environ.get(WARM)
        if kept and self._join(Path(kept), environ, log, locks):
            return
        self.socket, theirs = socket.socketpair()
        argv = [sys.executable, "-u", "-m", "trainers.warm", str(theirs.fileno()), module]
        with no_links.open_file(log.parent, log, "ab") as output:
            self.process = subprocess.Popen(
                [*argv, "deepspeed"] if deepspeed else argv,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
                pass_fds=(theirs.fileno(), *locks),
            )
        self.pid = self.process.pid
        theirs.close()

    def _join(self, kept: Path, environ: Mapping[str, str], log: Path, locks: list[int]) -> bool:
        """Connect to the process that is kept for several runs. Return whether it serves this run."""
        hello = {
            "cwd": os.getcwd(),
            "log": str(log),
            "inherited": inherited(),
            "environ": read_by_imports(environ),
        }
        try:
            self.socket = connect(kept)
            socket.send_fds(self.socket, [json.dumps(hello).encode()], locks)
        except ConfigError as error:  # nothing was sent: the process that listens may not be this user's
            say("warning", f"{WARM}: {error}", "The run imports the libraries itself.")
            return False
        except OSError as error:
            say("note", f"{WARM}: {kept}: {error.strerror}; the run imports the libraries itself")
            return False
        end = time.monotonic() + ANSWER_SECONDS
        while not (answers := self.answers(1.0)) and not self.ended and time.monotonic() < end:
            pass
        self.imported = any("imported" in answer for answer in answers)
        self.pid = next((int(answer["pid"]) for answer in answers if "pid" in answer), 0)
        if not self.imported:
            silent = "it ended" if self.ended else f"it gave no answer for {ANSWER_SECONDS:.0f} s"
            why = next((answer["refused"] for answer in answers if "refused" in answer), silent)
            say("note", f"{WARM}: {why}; the run imports the libraries itself")
            self.socket.close()
            self.buffer, self.ended = b"", False
        return self.imported

    def start(
        self, argv: list[str], environ: Mapping[str, str], not_needed: Callable[[], bool]
    ) -> dict[int, int]:
        """Fork the ranks of this machine, as `accelerate launch ARGV` would start them. Return rank -> pid.

        If the process has ended, its spare forks them.

        Raises:
            Refused: a fork is not safe, or the process ended without a spare, or it hangs in an import.
            NotNeeded: `not_needed` became true before the imports were done.
        """
        self._wait_for_imports(not_needed)
        request = json.dumps({"start": {"argv": argv, "environ": dict(environ)}}).encode() + b"\n"
        while (pids := self._ask(request)) is None:
            if not self.take_over():
                raise Refused("the process that imports the libraries ended")
        return pids

    def _wait_for_imports(self, not_needed: Callable[[], bool]) -> None:
        progress = Progress()
        while not self.imported and not self.ended:
            self.imported = any("imported" in answer for answer in self.answers(0.1))
            if self.process is not None and progress.idle(self.process.pid) > IDLE:
                raise Refused(f"the imports made no progress for {IDLE:.0f} s")
            if not_needed():
                raise NotNeeded

    def _ask(self, request: bytes) -> dict[int, int] | None:
        """Send a request for ranks. Return rank -> pid, or None if the process has ended."""
        try:
            self.socket.sendall(request)
        except OSError:
            self.ended = True
        while not self.ended:
            for answer in self.answers(1.0):
                if "refused" in answer:
                    raise Refused(answer["refused"])
                if "started" in answer:
                    return {int(rank): pid for rank, pid in answer["started"].items()}
        return None

    def take_over(self) -> bool:
        """Continue with the spare of the process, which has ended. Return False if there is none."""
        spare, self.spare = self.spare, None
        if spare is None or not spare.lives:
            return False
        self.close()
        self.process, self.serving, self.socket = None, spare, spare.connection
        self.pid, self.buffer, self.ended = spare.pid, b"", False
        while self.descriptors:  # the process was killed while it sent a message
            os.close(self.descriptors.pop())
        say("start", "a spare of the killed process forks the ranks; nothing is imported again")
        return True

    def answers(self, timeout: float) -> list[dict[str, Any]]:
        """Return the messages since the last call. Wait at most so many seconds for one."""
        if not select.select([self.socket], [], [], timeout)[0]:
            self._wake()
            return []
        try:
            received, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
            self.descriptors += descriptors
        except OSError:
            received = b""
        if not received:
            self.ended = True
            if self.process is not None:
                self.process.wait()
        *lines, self.buffer = (self.buffer + received).split(b"\n")
        found = []
        for message in map(json.loads, lines):
            if "spare" in message:
                self._keep_spare(message["spare"])
            else:
                found.append(message)
        return found

    def _keep_spare(self, pid: int) -> None:
        if self.spare is not None:
            self.spare.end()
        self.spare = Spare(socket.socket(fileno=self.descriptors.pop(0)), pid)

    def _wake(self) -> None:
        """Continue the process if it is stopped (SIGSTOP): it would never report the end of a rank."""
        with contextlib.suppress(OSError):
            if self.pid and read_stat(self.pid).state == "T":
                os.kill(self.pid, signal.SIGCONT)
                say("warning", f"process {self.pid}, which forks the ranks, was stopped; it is continued")

    def close(self) -> None:
        """Make the process kill the ranks that are left, and end, and its spare too."""
        if self.spare is not None:
            self.spare.end()
            self.spare = None
        if self.serving is not None:
            self.serving.end()
            self.serving = None
            return
        if self.process is not None:
            self.socket.close()
            self.process.kill()
            self.process.wait()
            return
        self._wake()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(1 << 16):
                pass  # wait until the other side closes: then the ranks have ended
        self.socket.close()
