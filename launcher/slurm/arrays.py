"""The runs of an array of jobs: one for each number, or for each line of a file."""

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

TASK = "SLURM_ARRAY_TASK_ID"
LARGEST_ARRAY = 10_000  # tasks
LIST = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%[1-9]\d*)?")  # sbatch's --array


@dataclass(frozen=True)
class Task:
    """A run of a submission; several where it is an array."""

    run: Run
    index: int | None = None


def numbered(config: Path, flags: Mapping[str, Any], array: str) -> list[Task]:
    """The run of each task of a list: the config reads its number as ${SLURM_ARRAY_TASK_ID}."""
    tasks = []
    for number in _numbers(array):
        with _saying(f"{TASK}={number}"):
            tasks.append(_task(config, flags, number, {**os.environ, TASK: str(number)}))
    _check_tasks(tasks, f"--array={array}", f"Write ${{{TASK}}} into it, for example run-${{{TASK}}}.")
    return tasks


def _numbers(array: str) -> list[int]:
    """1,3,8-12:2%4 -> 1, 3, 8, 10, 12."""
    found: list[int] = []
    for part in array.partition("%")[0].split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        if int(last or first) - int(first) > LARGEST_ARRAY or int(step or 1) < 1:
            raise ConfigError(f"--array={array}: {part} is no range of at most {LARGEST_ARRAY} tasks.")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    if not found:
        raise ConfigError(f"--array={array} names no task.")
    return list(dict.fromkeys(found))


def swept(config: Path | None, flags: Mapping[str, Any], sweep: Path) -> list[Task]:
    """The run of each line of a file."""
    tasks = []
    for number, line in enumerate(_lines(sweep), start=1):
        with _saying(f"{sweep}:{number}"):
            own_config, own = _own(line)
            if (config is None) == (own_config is None):
                raise ConfigError(
                    "no config. Begin the line with one, or name one for all before --array."
                    if config is None
                    else f"{own_config}: the command names a config already, {config}."
                )
            tasks.append(_task(config or own_config, {**flags, **own}, number))
    _check_tasks(tasks, str(sweep), "Give each line its own.")
    return tasks


def _task(
    config: Path | None, flags: Mapping[str, Any], number: int, environ: Mapping[str, str] = os.environ
) -> Task:
    run = load_run(config, flags, environ)
    check(run)
    return Task(run, number)


@contextmanager
def _saying(where: str) -> Iterator[None]:
    """A mistake is said with its place before it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_tasks(tasks: Sequence[Task], where: str, mend: str) -> None:
    """Each has a folder of its own, and all make one request."""
    if any(task.run.slurm != tasks[0].run.slurm for task in tasks):
        raise ConfigError(f"{where}: the tasks differ in what they ask of SLURM. An array has one request.")
    names = [task.run.train.project_name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{where}: two tasks have one project_name, {twice}. {mend}")


def _lines(sweep: Path) -> list[str]:
    """As bash reads them."""
    try:
        with sweep.open(encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--array: {sweep} is no text in UTF-8: {error}.") from None
    except OSError as error:
        raise ConfigError(
            f"--array: {sweep}: {error.strerror}. Give a file with a line of flags a run, or numbers (1-8%2)."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.replace("\t", " ").isprintable():
            raise ConfigError(
                f"{sweep}:{number}: control characters (a file of Windows?). A job's command may hold none."
            )
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(f"--array: {sweep} has no lines. Give a line of flags for each run.")
    return lines


def _own(line: str) -> tuple[Path | None, dict[str, str]]:
    """`[config.yaml] --lr 1e-4 --project-name a` as config and flags; each has one word for its value."""
    words = line.split()
    odd = next((word for word in words if not re.fullmatch(r"[A-Za-z0-9._:,/@%+=\[\]-]+", word)), None)
    if odd:
        raise ConfigError(f"{odd!r} may not stand here. Allowed: letters, digits and ._:,/@%+=[]-")
    config = words.pop(0) if len(words) % 2 else None
    names, values = words[::2], words[1::2]
    if not all(re.fullmatch(r"--[A-Za-z0-9_-]+", name) for name in names) or (config or "").startswith("-"):
        raise ConfigError(f"{line!r} is not a list of `--flag value`.")
    if dashed := next((value for value in values if re.match(r"-[^\d.]", value)), None):
        raise ConfigError(f"{dashed} would be taken for a flag.")
    flags = {name[2:].replace("-", "_"): value for name, value in zip(names, values, strict=True)}
    check_no_secret(flags)
    if of_all := next((name for name in flags if name in SlurmConfig.model_fields), None):
        raise ConfigError(f"{of_all} is asked for all tasks at once: give it to `phalanx submit`.")
    return Path(config) if config else None, flags
