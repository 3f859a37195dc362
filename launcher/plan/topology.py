"""Machines, GPUs and ranks: from the hardware (NVML), the environment, and SLURM_*."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from launcher.config import LaunchConfig
from launcher.plan.nodelist import hosts
from trainers.config.errors import ConfigError
from trainers.config.requirements import cpu_computes_bf16

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Gpu:
    """One visible GPU: name, memory in bytes, and compute capability (9.0 is Hopper)."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Hardware:
    """This machine.

    Its visible GPUs, host memory in bytes, usable cores, and whether the CPU computes in bf16.
    """

    gpus: tuple[Gpu, ...] = ()
    memory: int = 0
    cores: int = 1
    cpu_bf16: bool = False


@dataclass(frozen=True)
class Topology:
    """How the ranks lie on the machines."""

    num_machines: int
    machine_rank: int
    num_processes: int
    main_process_ip: str
    main_process_port: int
    hardware: Hardware = field(repr=False, default=Hardware())
    neighbour: str | None = None  # the name of another machine, where one is known

    @property
    def local_processes(self) -> int:
        """Ranks on each machine."""
        return self.num_processes // self.num_machines

    @property
    def on_gpu(self) -> bool:
        return bool(self.hardware.gpus)


def detect_hardware(environ: Mapping[str, str] = os.environ) -> Hardware:
    """Reads what this machine has, without torch and without touching CUDA."""
    return Hardware(
        gpus=_nvml_gpus(environ.get("CUDA_VISIBLE_DEVICES")),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)),
        cpu_bf16=cpu_computes_bf16(),
    )


def _nvml_gpus(visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs that NVML knows and CUDA_VISIBLE_DEVICES lets through; none where there is no driver."""
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
                break  # as CUDA does: the first unknown entry ends the list
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
    """The topology of this run: the config first, then SLURM, then the hardware.

    Raises:
        ConfigError: counts that do not fit each other or this machine.
    """
    in_step = "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NNODES", "1")) > 1
    machines = launch.num_machines or (int(environ["SLURM_NNODES"]) if in_step else 1)
    # SLURM_NODEID is read here, inside the task: in the batch script it would be 0 on every node
    # (accelerate#2816).
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
            f"launch.num_processes: {processes} ranks do not spread evenly over {machines} machines. "
            f"Allowed: a multiple of {machines}."
        )
    if gpus and processes // machines > gpus:
        raise ConfigError(
            f"launch.num_processes: {processes // machines} ranks on this machine are more than its {gpus} "
            f"visible GPU{'s' if gpus > 1 else ''}. Allowed: num_processes up to {gpus * machines}."
        )
    address = launch.main_process_ip or (_slurm_hosts(environ)[0] if in_step else LOOPBACK)
    if machines > 1 and address == LOOPBACK and not launch.main_process_ip:
        raise ConfigError(
            "launch.main_process_ip: several machines need the address of machine 0 (--main-process-ip)."
        )
    # With several machines, machine 0 chooses a port for each attempt (launcher/supervise/machines.py).
    port = launch.main_process_port or free_port()
    if rank == 0 and not is_free(port):
        raise ConfigError(
            f"launch.main_process_port: {port} is in use on this machine. Give another one, or leave it out: "
            "a free one is found."
        )
    known = in_step and not launch.main_process_ip
    neighbour = address if rank else _slurm_hosts(environ)[-1] if known else None
    return Topology(machines, rank, processes, address, port, hardware, neighbour)


def _slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    try:
        found = hosts(nodes)
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"SLURM's list of nodes {nodes!r} cannot be read. Give --main-process-ip.")
    return found


def interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches an address; None where none is found.

    Machines with several take the wrong one by themselves. Nothing is sent: a datagram socket is only bound.
    A name that leads to loopback tells nothing: Debian gives a machine's own name 127.0.1.1.
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
    """A port that nothing on loopback uses now; the kernel picks it."""
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
