"""The warm process: it imports the libraries once, then forks the ranks of this machine for each attempt.

The launcher runs `python -m trainers.warm FD trainers.sft [deepspeed]`. FD is a socket for lines of JSON:

    launcher -> here    {"start": {"argv": [arguments of `accelerate launch`], "environ": {of the launch}}}
    here -> launcher    {"imported": seconds}                       once, at the start
                        {"started": {"0": pid, "1": pid}}           global rank -> pid
                        {"refused": "why nothing was started"}
                        {"exited": {"rank": 1, "code": -9}}         for each rank that ends
                        {"spare": pid}                              with a socket as a descriptor

When the socket closes, the ranks are killed, with all that they started. The spare is a fork of this process.
If this process is killed, the spare serves the launcher in the same way, on its own socket (rank/forking.py).

Many short runs can share the imports. `python -m trainers.warm --keep PATH trainers.sft deepspeed` listens on
a socket in the file system. For each launcher that connects (PHALANX_WARM=PATH) it forks a process, which
serves the launcher as above, and ends when the launcher does. Only processes of one user talk to each other
(rank/private_socket.py). The first message of the launcher has its working directory, its log, what its
children inherit (rank/inherited.py), and the environment variables that imports read:

    launcher -> here    {"cwd": ..., "log": ..., "inherited": {...}, "environ": {...}}
                                                                    with the lock of the run as descriptors
    here -> launcher    {"imported": 0, "pid": ...}                 the process that serves it
    here -> launcher    {"refused": ...}                            the launcher then starts its own process
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trainers
from trainers.config.errors import USAGE_ERROR, ConfigError
from trainers.model.trust import refuse_kernels_at_imports
from trainers.rank import no_links
from trainers.rank.forking import Parent, Rank
from trainers.rank.import_environment import read_by_imports
from trainers.rank.inherited import take_on
from trainers.rank.library_patches import replaced
from trainers.rank.private_socket import accept, check_free, listen, peer
from trainers.rank.say import say
from trainers.rank.terminal import outlive_readers

LOCKS = 2  # descriptors of the lock on a run's folder (storage/folder_lock.py)
# A fork keeps only one thread, and CUDA does not survive it. This process has these values, its ranks do not.
PARENT_ONLY = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's OpenBLAS starts a thread for each core
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's jemalloc starts a thread
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch.cuda.is_available() asks NVML instead of CUDA
    "TRL_EXPERIMENTAL_SILENCE": "1",  # a rank sets it before it imports trl (rank/library_output.py)
}


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
        message, locks, _, _ = socket.recv_fds(channel, 1 << 20, LOCKS)
        if not message:
            return None
        hello = json.loads(message)
        parent = Parent(channel, launcher, left)
        if other := read_by_imports(environ).items() ^ hello["environ"].items():
            names = ", ".join(sorted({name for name, _ in other}))
            parent.send(refused=f"its imports used other values of {names}")
            return None
        try:
            take_on(hello["inherited"])
        except ValueError as error:
            parent.send(refused=str(error))
            return None
        os.chdir(hello["cwd"])
        _write_to(hello["log"])
        parent.send(imported=0.0, pid=os.getpid())
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


def warm_up(names: Sequence[str]) -> dict[str, str]:
    """Import these modules. If one belongs to trainers, import all modules of trainers.

    Returns the environment variables that the imports have set.
    """
    gc.disable()  # imports make little garbage, and looking for it takes a sixth of their time
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
    gc.enable()
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
    channel, launcher = socket.socket(fileno=int(descriptor)), os.pidfd_open(os.getppid())
    parent = Parent(channel, launcher, warm_up(names), spares=True)
    parent.send(imported=round(time.monotonic() - began, 2))
    rank = parent.serve()
    if rank is None:  # the launcher is gone; what the libraries do at an exit would only keep the run's lock
        os._exit(0)
    return rank.run()


if __name__ == "__main__":
    sys.exit(main())
