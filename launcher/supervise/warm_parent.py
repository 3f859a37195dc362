"""The launcher's end of trainers/warm.py: the process that imports the libraries once and forks the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from trainers.rank.import_environment import read_by_imports
from trainers.rank.process import die_with_parent
from trainers.rank.protocol import WARM
from trainers.rank.say import say


class Refused(Exception):
    """The ranks cannot be forked; the message says why."""


class GivenUp(Exception):
    """Nobody wants the ranks any more."""


class WarmParent:
    """Imports begin when it is made; start() waits for them."""

    def __init__(
        self, module: str, deepspeed: bool, environ: Mapping[str, str], log: Path, lock: IO[str] | None
    ) -> None:
        """`lock`: what keeps the run's folder; it is free when all that hold it are gone."""
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer, self.imported, self.ended = b"", False, False
        locks = [] if lock is None else [lock.fileno()]
        kept = environ.get(WARM)
        if kept and self._joined(Path(kept), environ, log, locks):
            return
        self.socket, theirs = socket.socketpair()
        argv = [sys.executable, "-u", "-m", "trainers.warm", str(theirs.fileno()), module]
        with log.open("ab") as output:
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
        theirs.close()

    def _joined(self, kept: Path, environ: Mapping[str, str], log: Path, locks: list[int]) -> bool:
        """Whether the process that is kept for several runs serves this one."""
        self.socket = socket.socket(socket.AF_UNIX)
        hello = {"cwd": os.getcwd(), "log": str(log), "environ": read_by_imports(environ)}
        try:
            self.socket.connect(str(kept))
            socket.send_fds(self.socket, [json.dumps(hello).encode()], locks)
        except OSError as error:
            say("note", f"{WARM}: {kept}: {error.strerror}; the libraries are imported anew")
            self.socket.close()
            return False
        while not (answers := self.answers(None)) and not self.ended:
            pass
        self.imported = any("imported" in answer for answer in answers)
        if not self.imported:
            why = next((answer["refused"] for answer in answers if "refused" in answer), "it ended")
            say("note", f"{WARM}: {why}; the libraries are imported anew")
            self.socket.close()
            self.buffer, self.ended = b"", False
        return self.imported

    def start(
        self, argv: list[str], environ: Mapping[str, str], given_up: Callable[[], bool]
    ) -> dict[int, int]:
        """Forks the ranks of this machine, as `accelerate launch ARGV` would start them: rank -> pid.

        Raises:
            Refused: a fork would not be safe, or the process ended.
            GivenUp: `given_up` became true before the imports ended.
        """
        while not self.imported and not self.ended:
            self.imported = any("imported" in answer for answer in self.answers(0.1))
            if given_up():
                raise GivenUp
        request = json.dumps({"start": {"argv": argv, "environ": dict(environ)}})
        try:
            self.socket.sendall(request.encode() + b"\n")
        except OSError:
            raise Refused("the process that imports the libraries ended") from None
        while True:
            for answer in self.answers(None):
                if "refused" in answer:
                    raise Refused(answer["refused"])
                if "started" in answer:
                    return {int(rank): pid for rank, pid in answer["started"].items()}
            if self.ended:
                raise Refused("the process that imports the libraries ended")

    def answers(self, timeout: float | None) -> list[dict[str, Any]]:
        """What it has said since the last call; waits for a word at most so many seconds."""
        if not select.select([self.socket], [], [], timeout)[0]:
            return []
        try:
            received = self.socket.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            self.ended = True
            if self.process is not None:
                self.process.wait()
        *lines, self.buffer = (self.buffer + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """It kills what ranks are left, and ends."""
        if self.process is not None:
            self.socket.close()
            self.process.kill()
            self.process.wait()
            return
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(1 << 16):
                pass  # its end is ours to wait for: the ranks are gone then
        self.socket.close()
