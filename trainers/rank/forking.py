"""The warm process as one launcher sees it, after the imports: it forks ranks, and a spare of itself.

trainers/warm.py describes the messages. Before its first ranks this process forks a spare, which waits. If
this process is killed, its ranks die with it, and the launcher turns to the spare: nothing is imported again.
The spare then forks a spare of its own. Memory that nobody writes to is shared.

A spare outlives its parent, so the kernel cannot end it with its parent. It ends when the launcher does, even
if that is killed: then its socket closes, and its pidfd of the launcher becomes readable. If the spare is
stopped (SIGSTOP), the kernel continues it then.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config.text import count_of
from trainers.rank.outliving import die_with_parent, wake_for
from trainers.rank.process import kill_session

# Only the launcher ends this process. A signal to all processes of a job, as SLURM sends it, is for the
# ranks. If this process died of it, the ranks would die with it.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_UVM = "/dev/nvidia-uvm"  # every process that has started CUDA has it open; NVML does not need it


@dataclass(frozen=True)
class Rank:
    """A rank that was just forked: it runs `python -m module arguments` in its own environment."""

    module: str
    arguments: list[str]
    environ: dict[str, str]
    left_by_imports: dict[str, str]  # variables that its imports would set if they are not set
    parent: int

    def run(self) -> int:
        """Run main() of the module, and return the exit code. The interpreter then ends as usual."""
        os.setsid()  # as torchrun does for its workers, which get signals one by one
        die_with_parent()
        if os.getppid() != self.parent:
            return 1  # the parent died before die_with_parent() had an effect
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
        loaded = os.environ.get("OMP_NUM_THREADS")
        os.environ.clear()
        os.environ.update(self.left_by_imports | self.environ)
        _set_threads(loaded)
        module = importlib.import_module(self.module)
        sys.argv = [str(module.__file__), *self.arguments]
        code: int = module.main(self.arguments)
        return code


def _set_threads(loaded: str | None) -> None:
    """Set the number of threads in torch if OMP_NUM_THREADS differs from the value at the import of torch.

    OpenMP reads OMP_NUM_THREADS when torch is loaded. The launcher starts the parent with the value of the
    ranks, so that MKL limits its threads too, as in a new process.
    """
    import torch

    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted != loaded:
        torch.set_num_threads(int(wanted))


class Parent:
    """The warm process as one launcher sees it: it starts ranks on request, and reports when they end."""

    def __init__(
        self,
        channel: socket.socket,
        launcher: int | None,
        left_by_imports: dict[str, str],
        spares: bool = False,
    ) -> None:
        """Serve the launcher at the other end of `channel`.

        `launcher` is a pidfd of it, if it is known. `spares`: fork spares.
        """
        self.channel, self.launcher = channel, launcher
        self.left_by_imports, self.spares = left_by_imports, spares
        self.channel.set_inheritable(False)
        wake_for(channel)
        self.unread = b""
        self.spare: tuple[int, int] | None = None  # pidfd, pid
        self.ranks: dict[int, tuple[int, int]] = {}  # pidfd -> global rank, pid
        self.poll = select.poll()
        self.poll.register(channel, select.POLLIN)
        if launcher is not None:
            self.poll.register(launcher, select.POLLIN)

    def send(self, **message: Any) -> None:
        """Send a message to the launcher."""
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> Rank | None:
        """Serve the launcher until it is gone.

        Returns a Rank in each forked process, and None in this process at the end.
        """
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        try:
            while True:
                for descriptor, _ in self.poll.poll():
                    if descriptor == self.launcher:  # it has ended; a child of it may still hold the socket
                        raise EOFError
                    if descriptor in self.ranks:
                        self._report(descriptor)
                        continue
                    if self.spare is not None and descriptor == self.spare[0]:
                        self._lose_spare()
                        continue
                    for request in self._requests():
                        forked = self._start(**request["start"])
                        if isinstance(forked, Parent):
                            return forked.serve()
                        if forked is not None:
                            return forked
        except (EOFError, ConnectionError):
            self._kill()
            return None

    def _requests(self) -> list[dict[str, Any]]:
        """Read from the socket, and return the requests that are complete."""
        chunk = self.channel.recv(1 << 16)
        if not chunk:
            raise EOFError
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def _start(self, argv: list[str], environ: dict[str, str]) -> Rank | Parent | None:
        """Fork the ranks of `accelerate launch argv`, and a spare if there is none.

        Returns a Rank in each rank, a Parent in the spare, and None in this process.
        """
        from trainers.rank.accelerate_plan import plan

        try:
            planned = plan(argv, environ)
        except (ValueError, OSError) as error:  # accelerate refuses the arguments
            self.send(refused=f"accelerate: {error}")
            return None
        if reason := self._why_not():
            self.send(refused=reason)
            return None
        sys.stdout.flush()
        sys.stderr.flush()
        if self.spares and self.spare is None and (spare := self._fork_spare()):
            return spare
        parent, pids = os.getpid(), {}
        # Ignored signals would be lost in a new rank. Blocked ones wait until the rank has its handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        for number, environment in planned.environments.items():
            pid = os.fork()
            if pid == 0:
                self._leave()
                if self.launcher is not None:
                    os.close(self.launcher)
                return Rank(planned.module, planned.arguments, environment, self.left_by_imports, parent)
            pids[number] = pid
            descriptor = os.pidfd_open(pid)
            self.ranks[descriptor] = number, pid
            self.poll.register(descriptor, select.POLLIN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
        self.send(started=pids)
        return None

    def _fork_spare(self) -> Parent | None:
        """Fork a spare, and send the launcher a socket to it. Returns a Parent in the spare, else None.

        Without memory for it there is no spare.
        """
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as error:
            print(f"no spare: {error}", flush=True)
            ours.close()
            theirs.close()
            return None
        if pid == 0:
            theirs.close()
            self._leave()
            os.setsid()  # a signal to the group of this process does not reach it
            return Parent(ours, self.launcher, self.left_by_imports, spares=True)
        ours.close()
        self.spare = os.pidfd_open(pid), pid
        self.poll.register(self.spare[0], select.POLLIN)
        message = json.dumps({"spare": pid}).encode() + b"\n"
        socket.send_fds(self.channel, [message], [theirs.fileno()])
        theirs.close()
        return None

    def _lose_spare(self) -> None:
        """Forget a spare that was killed. The next start forks another one."""
        assert self.spare is not None
        descriptor, pid = self.spare
        self.poll.unregister(descriptor)
        os.close(descriptor)
        os.waitpid(pid, 0)
        self.spare = None

    def _why_not(self) -> str | None:
        if self.ranks:
            return f"the last start has {count_of(len(self.ranks), 'rank')} left"
        return unsafe()

    def _leave(self) -> None:
        """Close what only the parent needs, in a new process. A spare needs `launcher` too."""
        self.channel.close()
        for descriptor in (*self.ranks, *([] if self.spare is None else [self.spare[0]])):
            os.close(descriptor)

    def _report(self, descriptor: int) -> None:
        self.poll.unregister(descriptor)
        os.close(descriptor)
        number, pid = self.ranks.pop(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.send(exited={"rank": number, "code": code})

    def _kill(self) -> None:
        """Kill the ranks and their child processes, so that none is left when this process ends."""
        for _, pid in self.ranks.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kill_session(pid)


def unsafe() -> str | None:
    """Return why it is not safe to fork ranks from this process, or None if it is."""
    import torch

    tasks = [task for task in os.listdir("/proc/self/task") if task != str(os.getpid())]
    if tasks:
        names = ", ".join(Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in tasks)
        return f"other threads are running, and a fork would lose them: {names}"
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    touched = any(line.endswith(_UVM) for line in opened + mapped)
    if touched or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types there
        return "an import started CUDA, which does not survive a fork"
    return None
