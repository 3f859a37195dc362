"""`phalanx submit`: check a run on the login node, and give slurm/train.sh or slurm/array.sh to sbatch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config import SlurmConfig, load_run
from launcher.parser import add_config_flags
from launcher.slurm.arrays import LIST, Task, numbered_tasks, sweep_tasks
from launcher.slurm.job import SlurmError, ask
from launcher.slurm.journal import note
from launcher.slurm.request import TRAIN, check, check_no_secret, sbatch_argv
from trainers.config.errors import ConfigError
from trainers.storage.shipped import SLURM_SCRIPTS

ARRAY = SLURM_SCRIPTS / "array.sh"
HELP = "check a config on the login node, then submit it to SLURM"
USAGE = "config.yaml [--flag VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Each line of --array's file may begin with its own config. Then the command names none.
    parser.add_argument("config", type=Path, nargs="?", help="config file (YAML, in AutoTrain's format)")
    parser.add_argument("--dry-run", action="store_true", help="check, and only print the command")
    parser.add_argument("--parsable", action="store_true", help="print only the job's id")
    parser.add_argument(
        "--array",
        metavar="FILE[%N]|LIST",
        help="one run for each line of a file (at most N at a time), or for each number of sbatch's list",
    )
    add_config_flags(parser, slurm=True)


def run(config: Path | None, array: str | None, dry_run: bool, parsable: bool, **flags: Any) -> int:
    tasks, argv = plan(config, flags, array)
    if dry_run:
        print(shlex.join(argv))
        return 0
    job = submit(tasks, argv)
    print(job if parsable else f"job {job}: {', '.join(str(task.run.folder) for task in tasks)}")
    return 0


def plan(config: Path | None, flags: Mapping[str, Any], array: str | None) -> tuple[list[Task], list[str]]:
    """Load and check the runs, and return them with sbatch's argv.

    `array` is sbatch's list of task numbers (1-8%2), or a file with one line for each run (FILE or FILE%2).
    A line has the flags of its run, as words without quotes. It begins with its own config if the command
    names none.

    Raises:
        ConfigError: what is wrong; in an array, with the line or the task number.
    """
    words = _command_flags(flags)
    for word in (str(config or ""), array or "", *words):
        if not word.isprintable():
            raise ConfigError(f"{word!r} has control characters. A job's command must not have any.")
    check_no_secret(flags)
    for path in (str(config or ""), array or ""):
        if path.startswith("-"):
            raise ConfigError(f"{path}: the job would read it as a flag. Write ./{path}.")
    common = [*([str(config)] if config else []), *words]
    if array is None or LIST.fullmatch(array):
        if config is None:
            raise ConfigError(
                "submit: no config. Give one, or give --array a file whose lines begin with a config."
            )
        if array is None:
            run = load_run(config, flags)
            check(run)
            return [Task(run)], sbatch_argv(run, [str(TRAIN), *common])
        tasks = numbered_tasks(config, flags, array)
        return tasks, sbatch_argv(tasks[0].run, [str(TRAIN), *common], array, config)
    file, _, at_once = array.partition("%")
    tasks = sweep_tasks(config, flags, Path(file))
    numbers = f"1-{len(tasks)}" + (f"%{at_once}" if at_once else "")
    if not LIST.fullmatch(numbers):
        raise ConfigError(
            f"--array: {at_once!r} is not a number of tasks that run at a time. Write for example {file}%2."
        )
    script = [str(ARRAY), file, *common]
    return tasks, sbatch_argv(tasks[0].run, script, numbers, config or Path(file))


def submit(tasks: Sequence[Task], argv: Sequence[str]) -> str:
    """Call sbatch, record the job in the folder of each run, and return the job's id.

    Raises:
        ConfigError: sbatch failed.
    """
    try:
        job = ask(*argv[:1], "--parsable", *argv[1:]).partition(";")[0]
    except SlurmError as error:
        raise ConfigError(f"{error}") from None
    for task in tasks:
        note(task.run.folder, job if task.index is None else f"{job}_{task.index}")
    return job


def _command_flags(flags: Mapping[str, Any]) -> list[str]:
    """Return the user's flags for the command of the job, without those that go to sbatch."""
    found = []
    for name, value in flags.items():
        if name not in SlurmConfig.model_fields:
            found.append(f"--{name.replace('_', '-')}={value}")
    return found
