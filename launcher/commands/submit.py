"""`phalanx submit`: checks a run on the login node, and hands slurm/train.sh or slurm/array.sh to sbatch."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config import Run, SlurmConfig, load_run
from launcher.parser import add_config_flags
from launcher.slurm.arrays import LIST, Task, numbered, swept
from launcher.slurm.job import NoSlurm, ask
from launcher.slurm.journal import note
from launcher.slurm.request import TRAIN, check, check_no_secret, sbatch_argv
from trainers.config.errors import ConfigError
from trainers.storage.shipped import SLURM_SCRIPTS

ARRAY = SLURM_SCRIPTS / "array.sh"
HELP = "check a config on the login node, then hand it to SLURM"
USAGE = "config.yaml [--flag VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The lines of --array may begin with a config each; then the command names none.
    parser.add_argument("config", type=Path, nargs="?", help="config file (YAML, AutoTrain's form)")
    parser.add_argument("--dry-run", action="store_true", help="check, and print the command only")
    parser.add_argument("--parsable", action="store_true", help="print only the job's id")
    parser.add_argument(
        "--array",
        metavar="FILE[%%N]|LIST",
        help="a run for each line of a file (at most N at once), or for each of sbatch's numbers",
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
    """Loads and checks what is to be submitted; returns the runs, and sbatch's argv.

    `array` is sbatch's list of task numbers (1-8%2), or a file with a line a run, FILE or FILE%2: the run's
    flags in words without quotes, after a config of its own where the command names none.

    Raises:
        ConfigError: what is wrong, in the line of the file or the task where there are several.
    """
    words = _words(flags)
    for word in (str(config or ""), array or "", *words):
        if not word.isprintable():
            raise ConfigError(f"{word!r} has control characters. A job's command may hold none.")
    check_no_secret(flags)
    for path in (str(config or ""), array or ""):
        if path.startswith("-"):
            raise ConfigError(f"{path}: the job would take it for a flag. Write ./{path}.")
    common = [*([str(config)] if config else []), *words]
    if array is None or LIST.fullmatch(array):
        if config is None:
            raise ConfigError(
                "submit: no config. Name one, or give --array a file whose lines begin with one."
            )
        if array is None:
            run = load_run(config, flags)
            check(run)
            return [Task(run)], sbatch_argv(_named(run), [str(TRAIN), *common])
        tasks = numbered(config, flags, array)
        return tasks, sbatch_argv(_named(tasks[0].run, config), [str(TRAIN), *common], array)
    file, _, at_once = array.partition("%")
    tasks = swept(config, flags, Path(file))
    numbers = f"1-{len(tasks)}" + (f"%{at_once}" if at_once else "")
    if not LIST.fullmatch(numbers):
        raise ConfigError(f"--array: {at_once!r} is no number of tasks that may run at once.")
    named = _named(tasks[0].run, config or Path(file))
    return tasks, sbatch_argv(named, [str(ARRAY), file, *common], numbers)


def submit(tasks: Sequence[Task], argv: Sequence[str]) -> str:
    """Calls sbatch, notes the job in the folder of each run, and returns its id.

    Raises:
        ConfigError: sbatch refused.
    """
    try:
        job = ask(*argv[:1], "--parsable", *argv[1:]).partition(";")[0]
    except NoSlurm as error:
        raise ConfigError(f"{error}") from None
    for task in tasks:
        note(task.run.folder, job if task.index is None else f"{job}_{task.index}")
    return job


def _named(run: Run, of_many: Path | None = None) -> Run:
    """With the job's name, where the user gave none: the project's, or that of the file behind many runs."""
    if run.slurm.job_name:
        return run
    name = of_many.stem if of_many else Path(run.train.project_name).name
    slurm = run.slurm.model_copy(update={"job_name": re.sub(r"[^A-Za-z0-9._-]", "-", name)})
    return replace(run, slurm=slurm)


def _words(flags: Mapping[str, Any]) -> list[str]:
    """The flags of the run as they were given; those of SLURM are sbatch's."""
    found = []
    for name, value in flags.items():
        if name not in SlurmConfig.model_fields:
            found.append(f"--{name.replace('_', '-')}={value}")
    return found
