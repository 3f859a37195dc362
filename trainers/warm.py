"""Forks the ranks of this machine, again for each restart, from one process that has imported what they need.

The launcher runs `python -m trainers.warm FD trainers.sft [deepspeed]`. FD is a socket for lines of JSON:

    launcher -> here    {"start": {"argv": [what follows `accelerate launch`], "environ": {the launch's own}}}
    here -> launcher    {"imported": seconds}                       once, at the start
                        {"started": {"0": pid, "1": pid}}           global rank -> pid
                        {"refused": "why nothing was started"}
                        {"exited": {"rank": 1, "code": -9}}         for each rank that ends

When the socket closes, the ranks are killed.

Many short runs can share the imports: `python -m trainers.warm --keep PATH trainers.sft deepspeed` listens
at a socket in the file system, and forks for each launcher that comes (PHALANX_WARM=PATH) a process that
serves it as above. The launcher's first message says where it is, and what its environment holds that imports
read:

    launcher -> here    {"cwd": ..., "log": ..., "environ": {...}}  with the run's lock as a descriptor
    here -> launcher    {"refused": ...}                            it starts a process of its own then
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainers
from trainers.rank.import_environment import read_by_imports
from trainers.rank.library_patches import replaced
from trainers.rank.process import die_with_parent

# A fork keeps one thread, and CUDA does not survive it: for this process alone, never for its ranks.
PARENT_ONLY = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's OpenBLAS starts a thread for each core
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # so does the jemalloc inside pyarrow
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # "is there a GPU?" is asked of NVML, not of CUDA
    "TRL_EXPERIMENTAL_SILENCE": "1",  # as a rank sets it before it imports trl (trainers/loop/life.py)
}
# The launcher alone ends this process. A signal to all processes of a job, as SLURM sends one, is for the
# ranks, and they would die with their parent.
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_UVM = "/dev/nvidia-uvm"  # open in every process that has started CUDA; NVML does without


@dataclass(frozen=True)
class Rank:
    """A process just forked, which is to become `python -m module arguments` in an environment of its own."""

    module: str
    arguments: list[str]
    environ: dict[str, str]
    left_by_imports: dict[str, str]  # what its own imports would set where it is not set
    parent: int

    def run(self) -> int:
        """Runs the module's main, and returns its exit code; the interpreter then ends as usual."""
        os.setsid()  # as torchrun's workers, which are signalled one by one
        die_with_parent()
        if os.getppid() != self.parent:
            return 1  # it died before that was in force
        for number in DEAF_TO:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)
        loaded = os.environ.get("OMP_NUM_THREADS")
        os.environ.clear()
        os.environ.update(self.left_by_imports | self.environ)
        _set_threads(loaded)
        module = importlib.import_module(self.module)
        sys.argv = [str(module.__file__), *self.arguments]
        code: int = module.main(self.arguments)
        return code


def _set_threads(loaded: str | None) -> None:
    """OpenMP read OMP_NUM_THREADS when torch was loaded; another value is told to torch.

    The launcher starts the parent with the ranks' value, so that MKL too caps it as in a fresh process.
    """
    import torch

    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted != loaded:
        torch.set_num_threads(int(wanted))


class Parent:
    """Answers the launcher's requests, and reports the ends of ranks."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.left_by_imports: dict[str, str] = {}
        self.channel.set_inheritable(False)
        self.unread = b""
        self.ranks: dict[int, tuple[int, int]] = {}  # pidfd -> global rank, pid
        self.poll = select.poll()
        self.poll.register(channel, select.POLLIN)

    def send(self, **message: Any) -> None:
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> Rank | None:
        """Returns twice: a Rank in each process that it forks, None here when the launcher is gone."""
        for number in DEAF_TO:
            signal.signal(number, signal.SIG_IGN)
        try:
            while True:
                for descriptor, _ in self.poll.poll():
                    if descriptor in self.ranks:
                        self._report(descriptor)
                        continue
                    for request in self._requests():
                        if rank := self._start(**request["start"]):
                            return rank
        except (EOFError, ConnectionError):
            self._kill()
            return None

    def _requests(self) -> list[dict[str, Any]]:
        """The requests that have come in whole."""
        chunk = self.channel.recv(1 << 16)
        if not chunk:
            raise EOFError
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def _start(self, argv: list[str], environ: dict[str, str]) -> Rank | None:
        """Forks the ranks of `accelerate launch argv`; a Rank in each of them, None here."""
        from trainers.rank.accelerate_plan import plan

        try:
            planned = plan(argv, environ)
        except (ValueError, OSError) as error:  # accelerate's own refusals
            self.send(refused=f"accelerate: {error}")
            return None
        if reason := self._why_not():
            self.send(refused=reason)
            return None
        parent, pids = os.getpid(), {}
        sys.stdout.flush()
        sys.stderr.flush()
        # Ignored, a signal to a rank just forked would be lost; blocked, it waits for the rank to listen.
        signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
        for number, environment in planned.environments.items():
            pid = os.fork()
            if pid == 0:
                self._leave()
                return Rank(planned.module, planned.arguments, environment, self.left_by_imports, parent)
            pids[number] = pid
            descriptor = os.pidfd_open(pid)
            self.ranks[descriptor] = number, pid
            self.poll.register(descriptor, select.POLLIN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)
        self.send(started=pids)
        return None

    def _why_not(self) -> str | None:
        if self.ranks:
            return f"{len(self.ranks)} ranks of the last start still run"
        return unsafe()

    def _leave(self) -> None:
        """In a new rank: what is the parent's is not the rank's."""
        self.channel.close()
        for descriptor in self.ranks:
            os.close(descriptor)

    def _report(self, descriptor: int) -> None:
        self.poll.unregister(descriptor)
        os.close(descriptor)
        number, pid = self.ranks.pop(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.send(exited={"rank": number, "code": code})

    def _kill(self) -> None:
        """The ranks and what they started; none is left when this process ends."""
        for _, pid in self.ranks.values():
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # not yet a session of its own
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def keep(path: Path, names: Sequence[str], environ: Mapping[str, str]) -> Rank | None:
    """Listens at `path`, for this user alone, until it is ended; a Rank in the processes that become ranks.

    `environ`: as it was before the imports.
    """
    path.unlink(missing_ok=True)
    left = warm_up(names)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o077)
    listener.bind(str(path))
    os.umask(mask)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever was forked for a launcher is waited for by nobody
    while True:
        channel, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _serve_one(channel, left, environ)
        channel.close()


def _serve_one(channel: socket.socket, left: dict[str, str], environ: Mapping[str, str]) -> Rank | None:
    """For one launcher, in a process of its own; the lock stays open here and in the ranks."""
    os.setsid()
    die_with_parent()
    message, locks, _, _ = socket.recv_fds(channel, 1 << 20, 1)
    hello = json.loads(message)
    parent = Parent(channel)
    parent.left_by_imports = left
    if other := read_by_imports(environ).items() ^ hello["environ"].items():
        parent.send(refused=f"its imports read another {', '.join(sorted({name for name, _ in other}))}")
        return None
    os.chdir(hello["cwd"])
    _write_to(hello["log"])
    parent.send(imported=0.0)
    rank = parent.serve()
    if rank is None:  # the ranks are gone; when the channel ends, nothing of the run may be open any more
        for number in locks:
            os.close(number)
        os.chdir("/")
        _write_to(os.devnull)
    return rank


def _write_to(path: str) -> None:
    """Sends what this process prints to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)


def unsafe() -> str | None:
    """Why a fork of this process would not be a sound rank; None if it would."""
    import torch

    tasks = [task for task in os.listdir("/proc/self/task") if task != str(os.getpid())]
    if tasks:
        names = ", ".join(Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in tasks)
        return f"threads run beside the main one, and a fork would lose them: {names}"
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    touched = any(line.endswith(_UVM) for line in opened + mapped)
    if touched or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types there
        return "an import started CUDA, which does not survive a fork"
    return None


def warm_up(names: Sequence[str]) -> dict[str, str]:
    """Imports these modules; with one of trainers, all that a run of any trainer imports.

    Returns what the imports put into the environment.
    """
    import torch

    before = dict(os.environ)
    with replaced(torch.cuda, "get_device_capability", _capability):
        for name in names:
            importlib.import_module(name)
        if any(name.startswith("trainers.") for name in names):
            for module in pkgutil.walk_packages(trainers.__path__, "trainers."):
                importlib.import_module(module.name)
        importlib.import_module("trainers.rank.accelerate_plan")
    gc.collect()
    gc.freeze()  # the collector leaves these pages alone, and the ranks go on sharing them
    left = {name: value for name, value in os.environ.items() if name not in before}
    if "deepspeed" in sys.modules:  # it sets this one too, and found it set
        left["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return left


def _capability(device: Any = None) -> tuple[int, int]:
    """torch.cuda.get_device_capability without CUDA: bitsandbytes asks when peft imports it."""
    import pynvml
    import torch

    handle = torch.cuda._get_pynvml_handler(device)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return major, minor


def main(argv: Sequence[str] | None = None) -> int:
    descriptor, *names = sys.argv[1:] if argv is None else argv
    environ = dict(os.environ)
    os.environ |= PARENT_ONLY
    if descriptor == "--keep":
        kept = keep(Path(names[0]), names[1:], environ)
        return kept.run() if kept else 0
    began = time.monotonic()
    parent = Parent(socket.socket(fileno=int(descriptor)))
    parent.left_by_imports = warm_up(names)
    parent.send(imported=round(time.monotonic() - began, 2))
    rank = parent.serve()
    return rank.run() if rank else 0


if __name__ == "__main__":
    sys.exit(main())
