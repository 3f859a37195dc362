"""The warm process: it imports the libraries once, then forks the ranks of this machine for each attempt.

The launcher runs `python -m trainers.warm FD trainers.sft [deepspeed]`. FD is a socket for lines of JSON:

    launcher -> here    {"start": {"argv": [arguments of `accelerate launch`], "environ": {of the launch}}}
    here -> launcher    {"imported": seconds}                       once, at the start
                        {"started": {"0": pid, "1": pid}}           global rank -> pid
                        {"refused": "why nothing was started"}
                        {"exited": {"rank": 1, "code": -9}}         for each rank that ends

When the socket closes, the ranks are killed, with all that they started.

Many short runs can share the imports. `python -m trainers.warm --keep PATH trainers.sft deepspeed` listens on
a socket in the file system. For each launcher that connects (PHALANX_WARM=PATH) it forks a process, which
serves the launcher as above, and ends when the launcher does. Only processes of one user talk to each other
(rank/private_socket.py). The first message of the launcher has its working directory, its log, and the
environment variables that imports read:

    launcher -> here    {"cwd": ..., "log": ..., "environ": {...}}  with the lock of the run as a descriptor
    here -> launcher    {"refused": ...}                            the launcher then starts its own process
"""

from __future__ import annotations

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
from trainers.config.errors import USAGE_ERROR, ConfigError
from trainers.config.text import count_of
from trainers.model.trust import refuse_kernels_at_imports
from trainers.rank import no_links
from trainers.rank.import_environment import read_by_imports
from trainers.rank.library_patches import replaced
from trainers.rank.private_socket import accept, check_free, listen, peer
from trainers.rank.process import die_with_parent, kill_session
from trainers.rank.say import say
from trainers.rank.terminal import outlive_readers

# A fork keeps only one thread, and CUDA does not survive it. This process has these values, its ranks do not.
PARENT_ONLY = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's OpenBLAS starts a thread for each core
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's jemalloc starts a thread
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch.cuda.is_available() asks NVML instead of CUDA
    "TRL_EXPERIMENTAL_SILENCE": "1",  # a rank sets it before it imports trl (rank/library_output.py)
}
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

    def __init__(self, channel: socket.socket, launcher: int | None = None) -> None:
        """Serve the launcher at the other end of `channel`. `launcher` is a pidfd of it, if it is known."""
        self.channel, self.launcher = channel, launcher
        self.left_by_imports: dict[str, str] = {}
        self.channel.set_inheritable(False)
        self.unread = b""
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
                    for request in self._requests():
                        if rank := self._start(**request["start"]):
                            return rank
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

    def _start(self, argv: list[str], environ: dict[str, str]) -> Rank | None:
        """Fork the ranks of `accelerate launch argv`. Returns a Rank in each of them, else None."""
        from trainers.rank.accelerate_plan import plan

        try:
            planned = plan(argv, environ)
        except (ValueError, OSError) as error:  # accelerate refuses the arguments
            self.send(refused=f"accelerate: {error}")
            return None
        if reason := self._why_not():
            self.send(refused=reason)
            return None
        parent, pids = os.getpid(), {}
        sys.stdout.flush()
        sys.stderr.flush()
        # Ignored signals would be lost in a new rank. Blocked ones wait until the rank has its handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        for number, environment in planned.environments.items():
            pid = os.fork()
            if pid == 0:
                self._leave()
                return Rank(planned.module, planned.arguments, environment, self.left_by_imports, parent)
            pids[number] = pid
            descriptor = os.pidfd_open(pid)
            self.ranks[descriptor] = number, pid
            self.poll.register(descriptor, select.POLLIN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
        self.send(started=pids)
        return None

    def _why_not(self) -> str | None:
        if self.ranks:
            return f"the last start has {count_of(len(self.ranks), 'rank')} left"
        return unsafe()

    def _leave(self) -> None:
        """Close the descriptors of the parent, in a new rank."""
        self.channel.close()
        for descriptor in (*self.ranks, *([] if self.launcher is None else [self.launcher])):
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


def keep(path: Path, names: Sequence[str], environ: Mapping[str, str]) -> Rank | None:
    """Listen on the socket `path`, only for this user, until the process is killed.

    `environ` is the environment before the imports. Returns a Rank in each forked rank, and None in the other
    forked processes.

    Raises:
        ConfigError: `path` cannot be a socket that only this user can use.
    """
    check_free(path)  # before the imports, which take seconds
    left = warm_up(names)
    listener = listen(path)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the processes forked here
    while True:
        channel = accept(listener)
        if channel is None:
            say("warning", f"{path}: a process of another user connected; it was not served")
            continue
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _serve_one(channel, left, environ)
        channel.close()


def _serve_one(channel: socket.socket, left: dict[str, str], environ: Mapping[str, str]) -> Rank | None:
    """Serve one launcher in a forked process, until the launcher is gone, even if the first process ends.

    So a run in another terminal outlives the terminal of the first process. The lock of the run stays open
    here and in the ranks.
    """
    os.setsid()
    try:
        pid = peer(channel)[0]
        launcher = os.pidfd_open(pid) if pid else None  # 0: it is in another container
        message, locks, _, _ = socket.recv_fds(channel, 1 << 20, 1)
        if not message:
            return None
        hello = json.loads(message)
        parent = Parent(channel, launcher)
        parent.left_by_imports = left
        if other := read_by_imports(environ).items() ^ hello["environ"].items():
            names = ", ".join(sorted({name for name, _ in other}))
            parent.send(refused=f"its imports used other values of {names}")
            return None
        os.chdir(hello["cwd"])
        _write_to(hello["log"])
        parent.send(imported=0.0)
    except (ProcessLookupError, ConnectionError):
        return None  # the launcher has ended
    rank = parent.serve()
    if rank is None:  # the ranks are gone; close all files of the run before the channel closes
        for number in locks:
            os.close(number)
        os.chdir("/")
        _write_to(os.devnull)
    return rank


def _write_to(path: str) -> None:
    """Append the output of this process to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with no_links.open_file(Path(path).parent, Path(path), "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)


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


def warm_up(names: Sequence[str]) -> dict[str, str]:
    """Import these modules. If one belongs to trainers, import all modules of trainers.

    Returns the environment variables that the imports have set.
    """
    import torch

    before = dict(os.environ)
    refuse_kernels_at_imports()
    with replaced(torch.cuda, "get_device_capability", _capability):
        for name in names:
            importlib.import_module(name)
        if any(name.startswith("trainers.") for name in names):
            for module in pkgutil.walk_packages(trainers.__path__, "trainers."):
                importlib.import_module(module.name)
        importlib.import_module("trainers.rank.accelerate_plan")
    gc.collect()
    gc.freeze()  # the garbage collector then does not touch these pages, so the ranks keep sharing them
    left = {name: value for name, value in os.environ.items() if name not in before}
    if "deepspeed" in sys.modules:  # deepspeed sets this one, but PARENT_ONLY had already set it
        left["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return left


def _capability(device: Any = None) -> tuple[int, int]:
    """Replace torch.cuda.get_device_capability without CUDA: bitsandbytes calls it when peft imports it."""
    import pynvml
    import torch

    handle = torch.cuda._get_pynvml_handler(device)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return major, minor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the warm process, and in a forked rank the rank. Returns the exit code."""
    descriptor, *names = sys.argv[1:] if argv is None else argv
    environ = dict(os.environ)
    os.environ |= PARENT_ONLY
    if descriptor == "--keep":
        outlive_readers()  # the other output of this module goes to log files
        try:
            kept = keep(Path(names[0]), names[1:], environ)
        except (ConfigError, OSError) as error:
            say("error", f"--keep {names[0]}: {error}")
            return USAGE_ERROR
        return kept.run() if kept else 0
    began = time.monotonic()
    parent = Parent(socket.socket(fileno=int(descriptor)))
    parent.left_by_imports = warm_up(names)
    parent.send(imported=round(time.monotonic() - began, 2))
    rank = parent.serve()
    return rank.run() if rank else 0


if __name__ == "__main__":
    sys.exit(main())
