"""Compute what `accelerate launch` would start on this machine: a module, and the environment of each rank.

accelerate and torchrun's argument parser do the work. This module adds only the variables that torchrun's
agent sets.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed.run as torchrun
from accelerate.commands import launch
from accelerate.utils import prepare_simple_launcher_cmd_env
from accelerate.utils.other import get_free_port
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from trainers.rank.library_patches import replaced


@dataclass(frozen=True)
class Plan:
    """`python -m module arguments`, and the full environment of each global rank on this machine."""

    module: str
    arguments: list[str]
    environments: dict[int, dict[str, str]]


def plan(argv: Sequence[str], environ: Mapping[str, str]) -> Plan:
    """Return the ranks that `accelerate launch argv` would start in `environ`.

    This starts nothing and does not touch CUDA. accelerate runs up to the two calls that would start
    processes; the plan is built from the arguments of these calls.

    Raises:
        ValueError, OSError: accelerate refuses these arguments, or the port is taken.
    """
    found: list[Plan] = []

    def one_process(args: argparse.Namespace) -> None:
        found.append(_plan(args, {0: prepare_simple_launcher_cmd_env(args)[1]}))

    def with_agent(args: argparse.Namespace) -> None:
        found.append(_plan(args, _agent_environments(args)))

    args = launch.launch_command_parser().parse_args(argv)
    with (
        replaced_environment(environ),
        replaced(launch, "simple_launcher", one_process),
        replaced(torchrun, "run", with_agent),
    ):
        launch.launch_command(args)
    return found[0]


@contextmanager
def replaced_environment(environ: Mapping[str, str]) -> Iterator[None]:
    """Replace the contents of os.environ by `environ` while the block runs."""
    before, new = dict(os.environ), dict(environ)
    os.environ.clear()
    os.environ.update(new)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _plan(args: argparse.Namespace, environments: dict[int, dict[str, str]]) -> Plan:
    return Plan(args.training_script, list(args.training_script_args), environments)


def _agent_environments(args: argparse.Namespace) -> dict[int, dict[str, str]]:
    """Return the environment of each rank as torchrun's agent sets it.

    Source: torch 2.13, LocalElasticAgent._start_workers.
    """
    args.log_dir = os.devnull  # else torchrun creates a folder
    # With --standalone torchrun's agent would choose a free port itself.
    port = get_free_port() if args.standalone else None
    config = torchrun.config_from_args(args)[0]  # sets OMP_NUM_THREADS if it is not set
    address, given_port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=-1)
    local, machines = config.nproc_per_node, config.max_nodes
    world = str(local * machines)
    environments = {}
    for local_rank in range(local):
        rank = args.node_rank * local + local_rank
        environments[rank] = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(args.node_rank),
            "ROLE_RANK": str(rank),
            "ROLE_NAME": config.role,
            "LOCAL_WORLD_SIZE": str(local),
            "WORLD_SIZE": world,
            "GROUP_WORLD_SIZE": str(machines),
            "ROLE_WORLD_SIZE": world,
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port or given_port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": str(config.max_restarts),
            "TORCHELASTIC_RUN_ID": config.run_id,
            "TORCHELASTIC_USE_AGENT_STORE": "False",  # there is no agent: rank 0 creates the store
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
    return environments
