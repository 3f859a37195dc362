"""Machines, ranks and ports: from the config first, then from SLURM, then from the hardware."""

from __future__ import annotations

import socket
import sys
import types
from collections.abc import Mapping

import pytest
from fakes import GIB, machine

from launcher.config import LaunchConfig
from launcher.plan import topology
from launcher.plan.topology import (
    Hardware,
    Topology,
    detect_hardware,
    free_port,
    interface_to,
    resolve_topology,
)
from trainers.config.errors import ConfigError

CPU = machine()
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "node[07-08]",
}


def layout(hardware: Hardware = CPU, environ: Mapping[str, str] | None = None, **launch: object) -> Topology:
    return resolve_topology(LaunchConfig.model_validate(launch), hardware, environ or {})


@pytest.mark.parametrize(
    ("gpus", "launch", "processes", "local"),
    [
        (0, {}, 1, 1),
        (1, {}, 1, 1),
        (8, {}, 8, 8),
        (8, {"num_processes": 3}, 3, 3),
        (0, {"num_processes": 4}, 4, 4),
        (4, {"num_machines": 2, "main_process_ip": "h"}, 8, 4),
        (0, {"num_machines": 2, "main_process_ip": "h"}, 2, 1),
        (4, {"num_machines": 2, "num_processes": 2, "main_process_ip": "h"}, 2, 1),
    ],
)
def test_the_number_of_ranks(gpus: int, launch: dict[str, object], processes: int, local: int) -> None:
    found = layout(machine(gpus=gpus), **launch)
    assert (found.num_processes, found.local_processes, found.on_gpu) == (processes, local, gpus > 0)


@pytest.mark.parametrize(
    ("gpus", "launch", "words"),
    [
        (2, {"num_processes": 3}, "num_processes up to 2"),
        (2, {"num_processes": 8, "num_machines": 2, "main_process_ip": "h"}, "num_processes up to 4"),
        (0, {"num_processes": 3, "num_machines": 2, "main_process_ip": "h"}, "a multiple of 2"),
        (0, {"machine_rank": 1}, "Allowed: 0 to 0"),
        (0, {"machine_rank": 2, "num_machines": 2, "main_process_ip": "h"}, "Allowed: 0 to 1"),
        (0, {"num_machines": 2}, "--main-process-ip"),
    ],
)
def test_contradictory_counts_are_refused(gpus: int, launch: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout(machine(gpus=gpus), **launch)


def test_a_step_on_two_nodes_gives_two_machines() -> None:
    found = layout(machine(gpus=4), STEP)
    assert (found.num_machines, found.machine_rank, found.num_processes) == (2, 1, 8)
    assert found.main_process_ip == "node07"


def test_all_nodes_of_a_step_find_the_same_topology() -> None:
    """All but the port, which machine 0 sends to the others."""
    first, second = (layout(machine(gpus=4), {**STEP, "SLURM_NODEID": rank}) for rank in "01")
    assert (first.machine_rank, second.machine_rank) == (0, 1)
    same = ("num_machines", "num_processes", "main_process_ip")
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]


def test_a_step_may_use_only_some_nodes_of_a_job() -> None:
    assert layout(CPU, {**STEP, "SLURM_STEP_NODELIST": "node[11,13]"}).main_process_ip == "node11"


def test_the_batch_script_is_not_a_step() -> None:
    """In the batch script SLURM_NODEID is 0, whichever node it runs on."""
    outside = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    assert layout(machine(gpus=4), outside).num_machines == 1


def test_a_step_on_one_node_needs_no_slurm_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = layout(machine(gpus=4), {**STEP, "SLURM_NNODES": "1", "SLURM_NODEID": "0"})
    assert (found.num_machines, found.main_process_ip) == (1, "127.0.0.1")


def test_the_config_overrides_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = layout(CPU, STEP, num_machines=4, machine_rank=3, main_process_ip="head", main_process_port=4000)
    assert (found.num_machines, found.machine_rank) == (4, 3)
    assert (found.main_process_ip, found.main_process_port) == ("head", 4000)


def test_a_malformed_list_of_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'node\[1-' cannot be read\. Give --main-process-ip"):
        layout(CPU, {**STEP, "SLURM_JOB_NODELIST": "node[1-"})


def test_a_free_port_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_one_machine_takes_a_free_port_or_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "free_port", lambda: 45678)
    assert layout().main_process_port == 45678
    assert layout(main_process_port=5000).main_process_port == 5000


def test_the_interface_to_an_address() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("localhost") is None, "a name for loopback, as a machine's own name on Debian"
    assert interface_to("no such host.invalid") is None


def fake_nvml(cards: int) -> types.ModuleType:
    """Return a stub of pynvml with what _nvml_gpus uses."""
    module = types.ModuleType("pynvml")
    members = {
        "NVMLError": RuntimeError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: cards,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetName": lambda handle: f"card {handle}",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=80 * GIB),
    }
    module.__dict__.update(members)
    return module


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["card 0", "card 1", "card 2", "card 3"]),
        ("2,0", ["card 2", "card 0"]),
        ("GPU-1", ["card 1"]),
        ("1, 3", ["card 1", "card 3"]),
        ("", []),
        ("-1", []),
        ("0,9,1", ["card 0"]),
    ],
)
def test_cuda_visible_devices_chooses_the_gpus(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(4))
    found = detect_hardware({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.name for gpu in found.gpus] == names
    assert all(gpu.memory == 80 * GIB and gpu.capability == (9, 0) for gpu in found.gpus)


def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml(4)

    def fail() -> None:
        raise module.NVMLError("driver not loaded")

    module.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert detect_hardware({}).gpus == ()


def test_this_machine_has_cores_and_memory() -> None:
    found = detect_hardware({})
    assert found.cores >= 1
    assert found.memory > GIB // 4
