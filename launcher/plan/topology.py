"""Find the machines, GPUs and ranks of a run, from the config, SLURM_* and the hardware (NVML)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from launcher.config import LaunchConfig
from launcher.plan.nodelist import expand_nodelist
from trainers.config.errors import ConfigError
from trainers.config.requirements import cpu_computes_bf16
from trainers.config.text import count_of

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Gpu:
    """A visible GPU: its name, memory in bytes, and compute capability (9.0 is Hopper)."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """The hardware of this machine.

    It has the visible GPUs, host memory in bytes, usable cores, and whether the CPU computes in bf16.
    """

    gpus: tuple[Gpu, ...] = ()
    memory: int = 0
    cores: int = 1
    cpu_bf16: bool = False


@dataclass(frozen=True)
class Topology:
    """How the ranks are distributed over the machines."""

    num_machines: int
    machine_rank: int
    num_processes: int
    main_process_ip: str
    main_process_port: int
    hardware: Hardware = field(repr=False, default=Hardware())
    neighbour: str | None = None  # name or address of another machine, if known

    @property
    def local_processes(self) -> int:
        """The number of ranks on each machine."""
        return self.num_processes // self.num_machines

    @property
    def on_gpu(self) -> bool:
        return bool(self.hardware.gpus)


def detect_hardware(environ: Mapping[str, str] = os.environ) -> Hardware:
    """Return the hardware of this machine, without torch and without starting CUDA."""
    return Hardware(
        gpus=_nvml_gpus(environ.get("CUDA_VISIBLE_DEVICES")),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)),
        cpu_bf16=cpu_computes_bf16(),
    )


def _nvml_gpus(visible: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that NVML reports and CUDA_VISIBLE_DEVICES allows; none if there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            handles[str(index)] = handles[pynvml.nvmlDeviceGetUUID(handle)] = handle
        count = len(handles) // 2
        wanted = [str(index) for index in range(count)] if visible is None else visible.split(",")
        gpus = []
        for name in wanted:
            if name.strip() not in handles:
                break  # as in CUDA, the first unknown entry ends the list
            handle = handles[name.strip()]
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            gpus.append(Gpu(str(pynvml.nvmlDeviceGetName(handle)), memory, (major, minor)))
        return tuple(gpus)
    finally:
        pynvml.nvmlShutdown()


def resolve_topology(
    launch: LaunchConfig, hardware: Hardware, environ: Mapping[str, str] = os.environ
) -> Topology:
    """Return the topology of this run, from the config first, then SLURM, then the hardware.

    Raises:
        ConfigError: the counts contradict each other or this machine, an address is missing, or a port is in
            use.
    """
    in_step = "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NNODES", "1")) > 1
    machines = launch.num_machines or (int(environ["SLURM_NNODES"]) if in_step else 1)
    # Read SLURM_NODEID here, inside the task: in the batch script it is 0 for every node (accelerate#2816).
    number = int(environ["SLURM_NODEID"]) if in_step else 0
    rank = number if launch.machine_rank is None else launch.machine_rank
    if rank >= machines:
        raise ConfigError(
            f"launch.machine_rank: {rank} does not exist with num_machines: {machines}. Allowed: 0 to "
            f"{machines - 1}."
        )
    gpus = len(hardware.gpus)
    processes = launch.num_processes or max(gpus, 1) * machines
    if processes % machines:
        raise ConfigError(
            f"launch.num_processes: {count_of(processes, 'rank')} cannot be spread evenly over {machines} "
            f"machines. Allowed: a multiple of {machines}."
        )
    if gpus and processes // machines > gpus:
        raise ConfigError(
            f"launch.num_processes: {count_of(processes // machines, 'rank')} on this machine are more than "
            f"its {count_of(gpus, 'visible GPU')}. Allowed: num_processes up to {gpus * machines}."
        )
    address = launch.main_process_ip or (_slurm_hosts(environ)[0] if in_step else LOOPBACK)
    if machines > 1 and address == LOOPBACK and not launch.main_process_ip:
        raise ConfigError(
            "launch.main_process_ip: it is missing. Several machines need the address of machine 0 "
            "(--main-process-ip)."
        )
    # With several machines, machine 0 chooses a port for each attempt (launcher/supervise/machines.py).
    port = launch.main_process_port or free_port()
    if rank == 0 and not is_free(port):
        raise ConfigError(
            f"launch.main_process_port: {port} is in use on this machine. Give another port, or leave it out "
            "to use a free one."
        )
    known = in_step and not launch.main_process_ip
    neighbour = address if rank else _slurm_hosts(environ)[-1] if known else None
    return Topology(machines, rank, processes, address, port, hardware, neighbour)


def _slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    try:
        found = expand_nodelist(nodes)
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"SLURM's list of nodes {nodes!r} cannot be read. Give --main-process-ip.")
    return found


def interface_to(address: str) -> str | None:
    """Return the network interface through which this machine reaches an address, or None if none is found.

    NCCL and Gloo may choose the wrong one on machines with several. This sends nothing: it only connects a
    datagram socket. A name that resolves to loopback does not help: Debian gives a machine's own name
    127.0.1.1.
    """
    import psutil

    try:
        family, kind, protocol, _, peer = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)
            own = probe.getsockname()[0]
    except OSError:
        return None
    if ip_address(own).is_loopback and address not in (LOOPBACK, "::1"):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return str(name)
    return None


def free_port() -> int:
    """Return a port that no process uses on loopback now. The kernel chooses it."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether this machine can listen on a port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
