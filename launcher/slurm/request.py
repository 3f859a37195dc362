"""What a run requests from SLURM: sbatch's command, and whether it fits the run. No torch, no GPU."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from launcher.config import Run, SlurmConfig
from launcher.plan.backend import resolve_backend
from launcher.plan.preflight import preflight
from launcher.plan.topology import Gpu, Hardware, Topology
from trainers.config.errors import ConfigError
from trainers.config.schema import SECRET_FIELDS
from trainers.config.text import count_of
from trainers.storage.run_place import Input
from trainers.storage.shipped import SLURM_SCRIPTS

TRAIN = SLURM_SCRIPTS / "train.sh"
# The kind of the GPUs is known only on the nodes. Checks that depend on it are made there.
_SOME_GPU = Gpu("requested", 1 << 40, (9, 0))


def sbatch_argv(
    run: Run, script: Sequence[str] | None = None, array: str | None = None, array_file: Path | None = None
) -> list[str]:
    """Return the command that submits this run: `sbatch --nodes=2 ... slurm/train.sh config.yaml`.

    The job's name is slurm.job_name, or that of an array's file, or the project's.
    """
    flags = [f"--array={array}"] if array else []
    requested = run.slurm.model_dump(exclude_none=True)
    name = array_file.stem if array_file else Path(run.train.project_name).name
    requested.setdefault("job_name", re.sub(r"[^A-Za-z0-9._-]", "-", name))
    for name, value in requested.items():
        if value is not False:
            dashed = f"--{name.replace('_', '-')}"
            flags.append(dashed if value is True else f"{dashed}={value}")
    if run.slurm.dependency and "after" in run.slurm.dependency:
        flags.append("--kill-on-invalid-dep=yes")  # else a job whose dependency failed waits forever
    return ["sbatch", *flags, *(script or (str(TRAIN), str(run.config_path or "config.yaml")))]


def requested(run: Run) -> Topology:
    """Return the topology that the requested nodes will have.

    Raises:
        ConfigError: the request contradicts itself or the section `launch`.
    """
    ask_for, launch = run.slurm, run.launch
    machines, gpus = ask_for.nodes or 1, _gpus(ask_for)
    for name in ("machine_rank", "main_process_ip"):
        if getattr(launch, name) is not None:
            raise ConfigError(
                f"launch.{name}: it is for machines without SLURM. Leave it out: SLURM provides it."
            )
    if launch.num_machines not in (None, machines):
        raise ConfigError(
            f"launch.num_machines: {launch.num_machines} differs from slurm.nodes ({machines}). Leave it "
            "out: SLURM provides it."
        )
    processes = launch.num_processes or machines * max(gpus, 1)
    if processes % machines or (gpus and processes // machines > gpus):
        multiple, most = f" a multiple of {machines}", f" up to {machines * gpus}"
        raise ConfigError(
            f"launch.num_processes: {count_of(processes, 'rank')} cannot be placed on "
            + count_of(machines, "node")
            + (f" with {count_of(gpus, 'GPU')} each" if gpus else "")
            + f". Allowed:{multiple if machines > 1 else ''}{most if gpus else ''}."
        )
    hardware = Hardware((_SOME_GPU,) * gpus, 1 << 50, ask_for.cpus_per_task or 1, cpu_bf16=True)
    return Topology(machines, 0, processes, "node", 0, hardware)


def _gpus(slurm: SlurmConfig) -> int:
    """Return the number of GPUs on each node, from gpus_per_node or gres (gpu, gpu:4 or gpu:a100:4)."""
    if slurm.gpus_per_node is not None:
        return slurm.gpus_per_node
    for part in (slurm.gres or "").split(","):
        if found := re.fullmatch(r"gpu(:[A-Za-z]\w*)?(?:[:=](\d+))?", part):
            return int(found[2] or 1)
    return 0


def check(run: Run, others: Sequence[Input] = ()) -> None:
    """Check everything that can be checked before the job starts. `others`: see check_place().

    Raises:
        ConfigError: the first problem that would stop the run.
    """
    resolve_backend(run, requested(run))
    preflight(run, others)


def check_no_secret(flags: Collection[str]) -> None:
    """Refuse secret flags: everybody can read the command of a job.

    Raises:
        ConfigError: a flag is secret.
    """
    if secret := next((name for name in flags if name in SECRET_FIELDS), None):
        raise ConfigError(
            f"--{secret}: everybody could read it in the job's command. Put it into a file that only you can "
            "read, and set HF_TOKEN from that file in slurm/site.env."
        )
