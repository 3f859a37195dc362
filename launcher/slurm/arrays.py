"""The runs of a job array: one for each task number, or one for each line of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import Run, SlurmConfig, load_run
from launcher.slurm.request import check, check_no_secret
from trainers.config.errors import ConfigError
from trainers.config.redaction import remember_flags
from trainers.storage.run_place import Input

TASK = "SLURM_ARRAY_TASK_ID"
LARGEST_ARRAY = 10_000  # tasks
LIST = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?")  # sbatch's --array


@dataclass(frozen=True)
class Task:
    """A run of a submission, with its task number in an array."""

    run: Run
    index: int | None = None


def numbered_tasks(config: Path, flags: Mapping[str, Any], array: str) -> list[Task]:
    """Return the run of each task number. The config reads the number as ${SLURM_ARRAY_TASK_ID}."""
    tasks = []
    for number in _numbers(array):
        with _errors_at(f"{TASK}={number}"):
            tasks.append(_task(load_run(config, flags, {**os.environ, TASK: str(number)}), number))
    _check_tasks(tasks, f"--array={array}", f"Write ${{{TASK}}} into it, for example run-${{{TASK}}}.")
    return tasks


def _numbers(array: str) -> list[int]:
    """Return the numbers of a list: 1,3,8-12:2%4 -> 1, 3, 8, 10, 12."""
    found: list[int] = []
    for part in array.partition("%")[0].split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        if int(last or first) - int(first) > LARGEST_ARRAY or int(step or 1) < 1:
            raise ConfigError(f"--array={array}: {part} is not a range of at most {LARGEST_ARRAY} tasks.")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    if not found:
        raise ConfigError(f"--array={array} has no task. Give for example 1-8.")
    return list(dict.fromkeys(found))


def sweep_tasks(config: Path | None, flags: Mapping[str, Any], sweep: Path) -> list[Task]:
    """Return the run of each line of a file."""
    tasks = []
    for number, line in enumerate(_lines(sweep), start=1):
        with _errors_at(f"{sweep}:{number}"):
            line_config, line_flags = _parse_line(line)
            if (config is None) == (line_config is None):
                raise ConfigError(
                    "no config. Begin the line with a config, or give one for all lines before --array."
                    if config is None
                    else f"{line_config}: the command names a config already, {config}. Remove one of them."
                )
            run = load_run(config or line_config, {**flags, **line_flags})
            tasks.append(_task(run, number, Input("the list of the array", sweep)))
    _check_tasks(tasks, str(sweep), "Give each line its own project_name.")
    return tasks


def _task(run: Run, number: int, *others: Input) -> Task:
    check(run, others)
    return Task(run, number)


@contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Put the place of a mistake before the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_tasks(tasks: Sequence[Task], where: str, fix: str) -> None:
    """Check that each task has its own folder, and that all tasks have the same SLURM settings."""
    if any(task.run.slurm != tasks[0].run.slurm for task in tasks):
        raise ConfigError(
            f"{where}: the tasks have different slurm settings. Make them equal: an array has one request."
        )
    names = [task.run.train.project_name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{where}: two tasks have the same project_name, {twice}. {fix}")


def _lines(sweep: Path) -> list[str]:
    """Return the lines of the file as bash reads them, without empty lines at the end."""
    try:
        with sweep.open(encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--array: {sweep} is not UTF-8 text: {error}.") from None
    except OSError as error:
        raise ConfigError(
            f"--array: {sweep}: {error.strerror}. Give a file with one line of flags per run, or task "
            "numbers (1-8%2)."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.replace("\t", " ").isprintable():
            raise ConfigError(
                f"{sweep}:{number}: the line has control characters (perhaps Windows line endings). A job's "
                "command must not have any."
            )
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(f"--array: {sweep} has no lines. Give one line of flags for each run.")
    return lines


def _parse_line(line: str) -> tuple[Path | None, dict[str, str]]:
    """Return the config and the flags of a line such as `[config.yaml] --lr 1e-4 --project-name a`.

    Each flag has one word as its value.
    """
    words = line.split()
    remember_flags(words)
    invalid = next((word for word in words if not re.fullmatch(r"[A-Za-z0-9._:,/@%+=\[\]-]+", word)), None)
    if invalid:
        raise ConfigError(
            f"{invalid!r} has a character that is not allowed. Allowed: letters, digits and ._:,/@%+=[]-"
        )
    config = words.pop(0) if len(words) % 2 else None
    names, values = words[::2], words[1::2]
    if not all(re.fullmatch(r"--[A-Za-z0-9_-]+", name) for name in names) or (config or "").startswith("-"):
        raise ConfigError(f"{line!r} is not a list of `--flag value`.")
    if dashed := next((value for value in values if re.match(r"-[^\d.]", value)), None):
        raise ConfigError(f"{dashed} would be read as a flag. Only numbers may begin with '-'.")
    flags = {name[2:].replace("-", "_"): value for name, value in zip(names, values, strict=True)}
    check_no_secret(flags)
    if for_all := next((name for name in flags if name in SlurmConfig.model_fields), None):
        raise ConfigError(f"{for_all} applies to all tasks. Give it to `phalanx submit`, not in a line.")
    return Path(config) if config else None, flags
