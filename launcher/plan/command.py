"""Build the argv and the environment of `accelerate launch -m trainers.X` for this run. Starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.config import Run
from launcher.plan.backend import Backend
from launcher.plan.topology import LOOPBACK, Topology, interface_to
from trainers.rank.protocol import JOB_END, LIVE, LOG_DIR, AttemptFiles

ELASTIC = "elastic"  # torchrun's folder inside an attempt, removed at the end


def build_command(run: Run, topology: Topology, backend: Backend, files: AttemptFiles) -> list[str]:
    """Return the argv of a launch with these files."""
    argv = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(files.accelerate_config),
    ]
    if topology.num_machines > 1:
        # accelerate 1.15 ignores these two in the YAML: the defaults of its parser override them.
        argv += ["--rdzv_backend", "static", "--same_network"]
    argv += ["--num_cpu_threads_per_process", str(cpu_threads(topology))]
    argv += ["--log_dir", str(files.folder / ELASTIC)]  # else torchrun creates one in /tmp
    return [*argv, "-m", f"trainers.{run.train.kind.module}", str(files.config)]


def socket_interfaces(topology: Topology, base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that choose the ranks' network interface, without those that the site has set.

    On one machine it is loopback. `=` makes NCCL match the full name: without it, NCCL uses every interface
    whose name begins with this one.
    """
    several = topology.num_machines > 1
    name = interface_to((topology.neighbour or topology.main_process_ip) if several else LOOPBACK)
    if name is None:
        return {}
    found = {"NCCL_SOCKET_IFNAME": f"={name}", "GLOO_SOCKET_IFNAME": name}
    return {variable: value for variable, value in found.items() if variable not in base}


def launch_arguments(argv: list[str]) -> list[str]:
    """Return the part of build_command()'s argv that follows `accelerate launch`."""
    return argv[argv.index("accelerate.commands.launch") + 1 :]


def cpu_threads(topology: Topology) -> int:
    """Return the threads per rank: its share of the cores on CPUs, one on GPUs."""
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
    """Return the environment of the launch.

    It is the caller's environment (`base`), plus: one visible GPU for one process, the folder of the logs,
    threads, network interfaces, whether a person watches the terminal, the end of the job's time limit, and
    the hub token.
    """
    environment = dict(base)
    if topology.on_gpu and topology.num_processes == 1:
        # If one process sees several GPUs, the Trainer uses nn.DataParallel, which TRL refuses.
        environment["CUDA_VISIBLE_DEVICES"] = base.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment[LOG_DIR] = str(logs)
    # With deepspeed, accelerate leaves this to torchrun, which sets 1: a rank on CPUs would have one thread.
    environment.setdefault("OMP_NUM_THREADS", str(cpu_threads(topology)))
    environment |= socket_interfaces(topology, base)
    environment[LIVE] = "1" if live_terminal else "0"
    if job_end is not None:
        environment[JOB_END] = str(job_end)
    if run.train.token:
        environment["HF_TOKEN"] = run.train.token
    return environment
