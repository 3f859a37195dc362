"""The command of `accelerate launch` and the variables of the ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import machine

from launcher.config import Run
from launcher.plan.backend import Backend
from launcher.plan.command import build_command, build_environment
from launcher.plan.topology import Hardware, Topology
from trainers.rank.protocol import AttemptFiles

HERE = Path("/runs/mine/launch/attempt-1")
CPU = machine()
DDP = {"distributed_backend": "ddp"}
TWO_MACHINES = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "node07"}
Resolve = Callable[..., tuple[Run, Topology, Backend]]


@pytest.mark.parametrize(
    ("name", "hardware", "flags"),
    [
        ("command_one_cpu", CPU, {}),
        ("command_two_cpu_ranks", CPU, {"num_processes": 2, **DDP}),
        ("command_four_gpus", machine(gpus=4), {"num_processes": 4, "distributed_backend": "fsdp"}),
        ("command_two_machines", machine(gpus=4), {"num_processes": 8, **DDP, **TWO_MACHINES}),
    ],
)
def test_command(
    resolve: Resolve,
    same_as_golden: Callable[[str, str], None],
    name: str,
    hardware: Hardware,
    flags: dict[str, Any],
) -> None:
    argv = build_command(*resolve(hardware, **flags), AttemptFiles(HERE))
    assert argv[0] == sys.executable
    same_as_golden(f"{name}.txt", "\n".join(["python", *argv[1:]]) + "\n")


def test_with_more_ranks_than_cores_each_rank_gets_one_thread(resolve: Resolve) -> None:
    run, topology, chosen = resolve(num_processes=16, distributed_backend="ddp")
    argv = build_command(run, topology, chosen, AttemptFiles(HERE))
    assert argv[argv.index("--num_cpu_threads_per_process") + 1] == "1"


def test_environment(resolve: Resolve) -> None:
    run, topology, _ = resolve(token="hf_secret")
    base = {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    made = build_environment(run, topology, base, HERE, live_terminal=False)
    ours = {
        "PHALANX_LOG_DIR": str(HERE),
        "PHALANX_LIVE": "0",
        "OMP_NUM_THREADS": "8",
        "HF_TOKEN": "hf_secret",
    }
    assert made == {**base, **ours, "NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}
    assert build_environment(run, topology, base, HERE, live_terminal=True)["PHALANX_LIVE"] == "1"
    assert base == {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    assert "HF_TOKEN" not in build_environment(resolve()[0], topology, base, HERE, live_terminal=False)


def test_the_interface_between_machines(resolve: Resolve) -> None:
    """It is the interface to machine 0. What the site has set stays."""
    run, topology, _ = resolve(num_machines=2, main_process_ip="127.0.0.1", num_processes=2)
    made = build_environment(run, topology, {"NCCL_SOCKET_IFNAME": "ib0"}, HERE, live_terminal=False)
    assert (made["NCCL_SOCKET_IFNAME"], made["GLOO_SOCKET_IFNAME"]) == ("ib0", "lo")
    made = build_environment(run, topology, {}, HERE, live_terminal=False)
    assert made["NCCL_SOCKET_IFNAME"] == "=lo", "not every interface whose name begins with lo"
    run, topology, _ = resolve(num_processes=2)
    made = build_environment(run, topology, {}, HERE, live_terminal=False)
    assert made["GLOO_SOCKET_IFNAME"] == "lo", "the ranks of one machine use loopback"


def test_the_users_number_of_threads_stays(resolve: Resolve) -> None:
    run, topology, _ = resolve(num_processes=4)
    threads = [
        build_environment(run, topology, base, HERE, live_terminal=False)["OMP_NUM_THREADS"]
        for base in ({}, {"OMP_NUM_THREADS": "5"})
    ]
    assert threads == ["2", "5"]


@pytest.mark.parametrize(("visible", "expected"), [(None, "0"), ("2,3", "2")])
def test_one_process_sees_one_gpu(resolve: Resolve, visible: str | None, expected: str) -> None:
    run, topology, _ = resolve(machine(gpus=2), num_processes=1)
    base = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert (
        build_environment(run, topology, base, HERE, live_terminal=False)["CUDA_VISIBLE_DEVICES"] == expected
    )
    run, topology, _ = resolve(machine(gpus=2), num_processes=2)
    assert (
        build_environment(run, topology, base, HERE, live_terminal=False).get("CUDA_VISIBLE_DEVICES")
        == visible
    )
