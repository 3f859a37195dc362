"""sbatch's argv for slurm/train.sh, from the `slurm` section of a config. Pure: submits nothing."""

from __future__ import annotations

from launcher.backend import STATIC
from launcher.config import Run

SCRIPT = STATIC / "slurm" / "train.sh"


def sbatch_argv(run: Run) -> list[str]:
    """The command that submits this run: `sbatch --nodes=2 ... slurm/train.sh config.yaml`."""
    flags = []
    for name, value in run.slurm.model_dump(exclude_none=True).items():
        flags.append(f"--{name.replace('_', '-')}={value}")
    return ["sbatch", *flags, str(SCRIPT), str(run.config_path or "config.yaml")]
