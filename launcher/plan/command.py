"""Pure: the argv and environment of `accelerate launch -m trainers.X` for this run. Starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.config import Run
from launcher.plan.backend import Backend
from launcher.plan.topology import LOOPBACK, Topology, interface_to
from trainers.rank.protocol import JOB_END, LIVE, LOG_DIR, AttemptFiles

ELASTIC = "elastic"  # torchrun's own folder inside an attempt, removed at the end


def build_command(run: Run, topology: Topology, backend: Backend, files: AttemptFiles) -> list[str]:
    """argv of the launch with these files."""
    argv = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(files.accelerate_config),
    ]
    if topology.num_machines > 1:
        # In the YAML these two have no effect (accelerate 1.15): the parser's defaults win.
        argv += ["--rdzv_backend", "static", "--same_network"]
    argv += ["--num_cpu_threads_per_process", str(cpu_threads(topology))]
    argv += ["--log_dir", str(files.folder / ELASTIC)]  # else torchrun leaves a folder in /tmp
    return [*argv, "-m", f"trainers.{run.train.kind.module}", str(files.config)]


def socket_interfaces(topology: Topology, base: Mapping[str, str]) -> dict[str, str]:
    """By which network interface the ranks talk, where the site has not said it: on one machine, loopback.

    `=` is for NCCL, which else takes every interface whose name begins so.
    """
    several = topology.num_machines > 1
    name = interface_to((topology.neighbour or topology.main_process_ip) if several else LOOPBACK)
    if name is None:
        return {}
    found = {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}
    return {variable: value for variable, value in found.items() if variable not in base}


def launch_arguments(argv: list[str]) -> list[str]:
    """What follows `accelerate launch` in such an argv."""
    return argv[argv.index("accelerate.commands.launch") + 1 :]


def cpu_threads(topology: Topology) -> int:
    """Threads a rank: its share of the cores where it computes on them, else one."""
    if topology.on_gpu:
        return 1
    return max(1, topology.hardware.cores // topology.local_processes)


def build_environment(
    run: Run,
    topology: Topology,
    base: Mapping[str, str],
    logs: Path,
    live_terminal: bool,
    job_end: float | None = None,
) -> dict[str, str]:
    """The environment of the launch: the caller's, plus where ranks write their logs, and the hub token."""
    environment = dict(base)
    if topology.on_gpu and topology.num_processes == 1:
        # A single process that sees several GPUs would be wrapped in nn.DataParallel, which TRL refuses.
        environment["CUDA_VISIBLE_DEVICES"] = base.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment[LOG_DIR] = str(logs)
    # accelerate leaves it to torchrun for deepspeed, which sets 1: a rank on a CPU would have one thread.
    environment.setdefault("OMP_NUM_THREADS", str(cpu_threads(topology)))
    environment |= socket_interfaces(topology, base)
    environment[LIVE] = "1" if live_terminal else "0"
    if job_end is not None:
        environment[JOB_END] = str(job_end)
    if run.train.token:
        environment["HF_TOKEN"] = run.train.token
    return environment
