"""Build this run's accelerate config from a static template and the topology.

The sharding policy stays in the template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from launcher.config import LaunchConfig
from launcher.plan.backend import Backend
from launcher.plan.topology import Topology


def build_accelerate_config(
    backend: Backend, topology: Topology, launch: LaunchConfig, deepspeed_config: Path | None
) -> dict[str, Any]:
    """Return this run's accelerate config: the template with the topology filled in.

    `deepspeed_config` is the path of the generated deepspeed.json. accelerate uses this path as written, so
    it must be absolute.
    """
    config: dict[str, Any] = yaml.safe_load(backend.template.read_text(encoding="utf-8"))
    config.update(
        num_machines=topology.num_machines,
        num_processes=topology.num_processes,
        machine_rank=topology.machine_rank,
        main_process_ip=topology.main_process_ip,
        main_process_port=topology.main_process_port,
    )
    if backend.name == "fsdp" and launch.offload == "cpu":
        config["fsdp_config"]["fsdp_offload_params"] = True
    if "parallelism_config" in config:  # hybrid sharding: shards within a machine, replicas across machines
        config["parallelism_config"].update(
            parallelism_config_dp_replicate_size=topology.num_machines,
            parallelism_config_dp_shard_size=topology.local_processes,
        )
    if backend.name == "deepspeed":
        assert deepspeed_config is not None and deepspeed_config.is_absolute()
        config["deepspeed_config"]["deepspeed_config_file"] = str(deepspeed_config)
    return config


def build_deepspeed_config(backend: Backend) -> dict[str, Any] | None:
    """Return this run's deepspeed.json (the template), or None. The trainer fills its "auto" values."""
    if backend.deepspeed_template is None:
        return None
    config: dict[str, Any] = json.loads(backend.deepspeed_template.read_text(encoding="utf-8"))
    return config
