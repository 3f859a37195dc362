"""The full config of a run: the trainer's part, and the sections `launch` and `slurm`.

Only the launcher reads those two sections.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from trainers.config.errors import ConfigError
from trainers.config.field_types import Float, Int
from trainers.config.file import read_config_file
from trainers.config.names import ALIASES, DATA_KEYS
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings, changed, resolve
from trainers.config.values import Value, put, validate


class LaunchConfig(BaseModel):
    """The section `launch`: machines, ranks and sharding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_processes: Int | None = Field(
        None,
        gt=0,
        description="Number of ranks on all machines together. Default: one for each GPU, or one on each "
        "machine if it has no GPU.",
    )
    num_machines: Int | None = Field(
        None, gt=0, description="Number of machines. Default: the number of SLURM nodes, else 1."
    )
    machine_rank: Int | None = Field(
        None, ge=0, description="Number of this machine, from 0. Default: SLURM's node number, else 0."
    )
    main_process_ip: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9.:_-]+$",
        description="Address of machine 0. Default: the first SLURM node; loopback on one machine.",
    )
    main_process_port: Int | None = Field(
        None,
        gt=1023,
        lt=65536,
        description="Rendezvous port on machine 0. Default: a free port for each attempt.",
    )
    zero_stage: Int | None = Field(
        None, ge=1, le=3, description="ZeRO stage of deepspeed. Default: 3, as in AutoTrain."
    )
    sharding: Literal["full_shard", "shard_grad_op", "hybrid_shard"] | None = Field(
        None,
        description="What fsdp shards (docs/backends.md). Default: full_shard. hybrid_shard: shards within "
        "each machine, replicas across machines.",
    )
    offload: Annotated[Literal["none", "cpu"], BeforeValidator(lambda v: "none" if v is None else v)] = Field(
        "none",
        description="cpu: keep shards in host memory: parameters and optimiser state (fsdp, ZeRO 3), or only "
        "optimiser state (ZeRO 2).",
    )
    start: Literal["warm", "accelerate"] = Field(
        "warm",
        description="warm: one process imports the libraries and forks the ranks, if that is safe. "
        "accelerate: `accelerate launch` starts the ranks.",
    )
    max_restarts: Int = Field(
        10,
        ge=0,
        description="Maximum number of restarts after failures that a restart can fix. 0: none. Three "
        "attempts in a row without progress also end the run.",
    )
    restart_on_nan: bool = Field(
        False,
        description="Restart from the newest checkpoint after a NaN or infinite loss or gradient norm.",
    )
    hang_timeout: Float | None = Field(
        None,
        ge=0,
        description="Seconds without a heartbeat from a rank, or without progress outside steps, after which "
        "the attempt is killed. Default: 10 times the median step time, at least 60; outside steps 600 and "
        "more for large files. 0: never.",
    )


# Allow-lists for every string that can reach sbatch: no quotes, no control characters, no newlines.
_Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:,/@%+=\[\]-]+$")]
_Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:,/@%+=\[\]&|*()-]+$")]
_Title = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:,/@%+=\[\] -]+$", max_length=200)]


def _quoted_time(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError("YAML reads a time without quotes as a number. Use quotes, for example '12:00:00'")
    return value


class SlurmConfig(BaseModel):
    """The section `slurm`: sbatch's flags, for `phalanx submit` and `phalanx show`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: Int | None = Field(None, gt=0, description="Number of nodes.")
    gpus_per_node: Int | None = Field(None, ge=0, description="Number of GPUs on each node.")
    gres: _Plain | None = Field(
        None, description="GPUs on each node at sites without --gpus-per-node, such as gpu:4."
    )
    cpus_per_task: Int | None = Field(None, gt=0, description="CPU cores on each node.")
    mem: _Plain | None = Field(None, description="Memory on each node, such as 64G. 0: all of it.")
    exclusive: bool = Field(False, description="Do not share nodes with other jobs.")
    time: Annotated[_Plain | None, BeforeValidator(_quoted_time)] = Field(
        None, description="Time limit, such as 12:00:00 (in quotes in YAML)."
    )
    partition: _Plain | None = Field(None, description="Partition.")
    account: _Plain | None = Field(None, description="Account.")
    qos: _Plain | None = Field(None, description="Quality of service.")
    constraint: _Features | None = Field(None, description="Features that the nodes must have.")
    reservation: _Plain | None = Field(None, description="Reservation.")
    nodelist: _Plain | None = Field(None, description="Names of nodes to use.")
    exclude: _Plain | None = Field(None, description="Names of nodes not to use.")
    dependency: _Plain | None = Field(None, description="Jobs to wait for, such as afterok:1234.")
    job_name: _Title | None = Field(
        None,
        description="Name of the job. Default: from project_name; for an array, from its config or list.",
    )


@dataclass
class Run:
    """A run as the user described it: the three parts of the config, and the source of each value."""

    settings: Settings
    launch: LaunchConfig
    slurm: SlurmConfig
    launch_sources: dict[str, str]
    config_path: Path | None

    @property
    def train(self) -> TrainConfig:
        return self.settings.train

    @property
    def folder(self) -> Path:
        """The run's folder, as the user wrote it (relative to the working folder)."""
        return Path(self.train.project_name)

    def changed(self, why: str, **values: Any) -> Run:
        """Return the run with new values for some of the trainer's fields; `why` becomes their source."""
        changes = {name: Value(value, why, name) for name, value in values.items()}
        return replace(self, settings=changed(self.settings, changes))

    def located(self, message: str) -> str:
        """Put the line of the file, or the flag, before a message that begins with a key.

        The message stays as it is if the user did not set the key.
        """
        source = self.source_of(message.split(": ")[0])
        chosen = source and source != "default" and not source.startswith("derived")
        return f"{source}: {message}" if chosen else message

    def source_of(self, key: str) -> str:
        """Return where a key has its value from, or "" if the key is unknown.

        The key is written as in messages, such as `data.path`, `data.mix[0].path` or `launch.offload`. Keys
        of `slurm` have no recorded source.
        """
        if key.startswith("data.mix["):
            known = (
                key,
                key.partition("]")[0] + "]",
            )  # the key of a source, or the source: data.mix[0] (name)
            found = (self.settings.places[place] for place in known if place in self.settings.places)
            return next(found, self.settings.sources["mix"])
        section, _, name = key.rpartition(".")
        if section == "launch":
            return self.launch_sources.get(name, "")
        name = DATA_KEYS.get(name, name) if section == "data" else ALIASES.get(name, name)
        return self.settings.sources.get(name, "")


def load_run(path: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Run:
    """Return the effective config from the file and the flags. Flags override the file.

    `flags` are spelled as by the user, without leading dashes: `learning_rate` and `lr` both work. `${VAR}`
    in the file is read from `environ`.

    Raises:
        ConfigError: what is wrong, where, and how to fix it.
    """
    file = read_config_file(path, environ) if path else None
    values = dict(file.train) if file else {}
    launch = dict(file.launcher.get("launch", {})) if file else {}
    slurm = dict(file.launcher.get("slurm", {})) if file else {}
    given: dict[str, Value] = {}
    for name, value in flags.items():
        entry = Value(value, f"flag --{name.replace('_', '-')}", name)
        if name in LaunchConfig.model_fields:
            launch[name] = entry
        elif name in SlurmConfig.model_fields:
            slurm[name] = entry
        else:
            put(given, name, entry)
    values.update(given)
    settings = resolve(values)
    settings.notes = list(dict.fromkeys([*(file.notes if file else ()), *settings.notes]))
    run = Run(
        settings,
        validate(LaunchConfig, launch),
        validate(SlurmConfig, slurm),
        {name: launch[name].source if name in launch else "default" for name in LaunchConfig.model_fields},
        path,
    )
    check_folder_name(run.train.project_name, settings.sources["project_name"])
    return run


def check_folder_name(project_name: str, source: str) -> None:
    """Check that the run's folder is inside the working folder.

    Raises:
        ConfigError: it is outside (also through a link), it is the working folder itself, or the name has
            other characters than those allowed.
    """
    here = Path.cwd().resolve()
    target = (here / project_name).resolve()
    plain = all(c.isalnum() or c in "._-/" for c in project_name) and not project_name.startswith("-")
    if not plain or target == here or here not in target.parents:
        raise ConfigError(
            f"{source}: project_name: {project_name!r} is not a plain path inside the working folder {here}. "
            "Allowed: letters, digits, '.', '_', '-' and '/', for example my-run or runs/my-run."
        )
