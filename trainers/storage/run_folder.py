"""The folder of a run: its files, its lock, which checkpoint to resume from, and the record of the run.

<project_name>/                  final model, tokenizer, run.json, metrics.jsonl
<project_name>/checkpoint-N/     complete checkpoints; saving/ has one that is being written
<project_name>/launch/attempt-K/ files that the launcher generated, and the log of each rank
"""

from __future__ import annotations

import json
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.packages import versions
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.rank import no_links
from trainers.rank.protocol import LAUNCH, attempts, began
from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.folder_lock import lock_owner, refuse_running
from trainers.storage.identity import RECORD, recorded
from trainers.storage.manifest import (
    CHECKPOINT_PREFIX,
    MANIFEST,
    checkpoint_folders,
    is_checkpoint,
    newest_usable,
    step_of,
    why_unusable,
)
from trainers.storage.places import Place
from trainers.storage.run_files import LOCK

METRICS = "metrics.jsonl"
PROGRESS = f"{LAUNCH}/progress.json"  # the progress of the run, for `phalanx status`
INSTEAD = "resume: true uses the newest checkpoint that verifies."
SAVING = "saving"  # a checkpoint is in here until it is complete
FINISHED = "finished.json"  # that the model is saved, and what was done with it (ending.py)
TRACKER = "tracker.json"  # the id with which each start continues the same tracked run


def holds_run(folder: Path) -> bool:
    """Return whether a run was started in this folder before."""
    marks = (RECORD, f"{CHECKPOINT_PREFIX}*")
    return any(True for mark in marks for _ in folder.glob(mark)) or bool(_earlier_attempts(folder))


def _earlier_attempts(folder: Path) -> list[Path]:
    """Return the folders of attempts that machine 0 has set up.

    Another machine of this start may already have written its files, so only machine 0 counts.
    """
    return [attempt for attempt in attempts(folder).values() if began(attempt, machine=0)]


def _is_of_earlier_version(folder: Path) -> bool:
    """Return whether a run of ours that has no record of its files was started in this folder."""
    if run_files.recorded(folder) is not None:
        return False
    checkpoints = (path / MANIFEST for path in checkpoint_folders(folder))
    return _has_record(folder) or any(p.is_file() for p in checkpoints) or bool(_earlier_attempts(folder))


def owner_of(folder: Path) -> Path | None:
    """Return the folder around this one that belongs to a run, or is a checkpoint. Links are resolved.

    A run may delete what is inside its folder. A folder that only contains runs belongs to none.
    """
    return next((outer for outer in folder.resolve().parents if _belongs_to_run(outer)), None)


def _belongs_to_run(folder: Path) -> bool:
    marks = (run_files.WRITTEN, run_files.JOBS)
    return (
        any(os.path.lexists(folder / mark) for mark in marks)
        or _has_record(folder)
        or bool(_earlier_attempts(folder))
        or is_checkpoint(folder)
        or _is_locked(folder)
    )


def _is_locked(folder: Path) -> bool:
    lock = folder / LOCK
    readable = lock.is_file() and not lock.is_symlink() and os.access(lock, os.R_OK)
    return readable and lock_owner(folder) is not None


def _has_record(folder: Path) -> bool:
    return {"config", "versions"} <= recorded(folder).keys()


def check_free(folder: Path, config: TrainConfig, config_file: Path | None = None) -> None:
    """Refuse a folder that contains a run, unless the config resumes or overwrites it, or something else.

    Raises:
        ConfigError: the folder contains a run, or files that no run wrote, or links in place of a run's own
            files; or there is nothing to resume.
    """
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"project_name: {part} is a file. Give another name.")
    if holds_run(folder) and not (config.resume or config.overwrite):
        refuse_running(folder)
        raise ConfigError(
            f"project_name: {folder} already contains a run. Resume it with --resume, delete it and start "
            "again with --overwrite, or give another project_name."
        )
    if isinstance(config.resume, str) or (config.resume and not holds_run(folder)):
        resume_checkpoint(folder, config, content=False)
    _refuse_links(folder)
    _refuse_other_files(folder, config_file)
    if config.resume is True:
        resume_checkpoint(folder, config, content=False)


def _refuse_links(folder: Path) -> None:
    """Refuse links that a run would have to follow. All other links are replaced where the run writes."""
    appended = (LAUNCH, run_files.WRITTEN, LOCK, run_files.WANDB, run_files.TENSORBOARD)
    for path in (*(folder / name for name in appended), *(folder / LAUNCH).glob("*")):
        if path.is_symlink():
            raise no_links.LinkFound(path)


def _refuse_other_files(folder: Path, config_file: Path | None) -> None:
    """Refuse a folder that has something, but no run of ours. The config file may be in it, and logs."""
    if run_files.recorded(folder) is not None or _is_of_earlier_version(folder):
        return
    run, file = folder.resolve(), config_file or Path(os.devnull)
    configs = {path.name for path in (file.absolute(), file.resolve()) if path.parent.resolve() == run}
    foreign = (name for name in run_files.foreign(folder) if not _is_log(folder, name))
    if other := [name for name in foreign if name not in configs]:
        raise ConfigError(
            f"project_name: {folder} has {other[0]}, which no run wrote. Give a new or an empty folder. (The "
            "config file may be in it, and the output of the run as log, log.txt, *.log, *.out or *.err.)"
        )


def _is_log(folder: Path, name: str) -> bool:
    """Return whether this is a file for output: of `phalanx train ... | tee my-run/log`, or of sbatch.

    No run writes such a name there, so the file is never written over or removed.
    """
    path = folder / name
    return (
        re.fullmatch(r"log|log\.txt|[^/]+\.(log|out|err)", name) is not None
        and path.is_file()
        and not path.is_symlink()
    )


def claim(folder: Path, config: TrainConfig, config_file: Path | None = None) -> None:
    """Prepare the folder for this run.

    With overwrite, remove what the record of the earlier run lists, and name what is left.
    """
    check_free(folder, config, config_file)
    if newer_checkpoints(folder, config):
        resume_checkpoint(folder, config)  # reads the named one: if it is damaged, nothing is renamed
    run_files.begin(folder, _is_of_earlier_version(folder))
    if config.overwrite and (left := run_files.clear(folder)):
        say("note", f"overwrite: {folder} keeps {', '.join(left)}, which the earlier run did not write")
    run_files.own(folder, f"{SAVING}/")  # now, since the disk may be full when a checkpoint is saved
    set_aside_newer_checkpoints(folder, config)


def resume_checkpoint(
    folder: Path, config: TrainConfig, content: bool = True
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from (None: start from the beginning), and why newer ones are skipped.

    Without `content`, check only the names and sizes of the files, and do not read them.

    Raises:
        ConfigError: resume is true and the folder has no run, or has checkpoints of which none verifies; or
            the named checkpoint does not verify.
    """
    if not config.resume:
        return None, []
    if isinstance(config.resume, str):
        path = Path(config.resume)
        if not path.name.removeprefix(CHECKPOINT_PREFIX).isdigit():
            raise ConfigError(f"resume: {path} is not a checkpoint. Give a folder checkpoint-N of a run.")
        if not path.is_dir():
            raise ConfigError(f"resume: {path} does not exist. {INSTEAD}")
        if why := why_unusable(path, content):
            raise ConfigError(f"resume: {path} cannot be used: {why}. {INSTEAD}")
        return path, []
    if not holds_run(folder):
        raise ConfigError(f"resume: there is no run in {folder}. Start without --resume.")
    found, skipped = newest_usable(folder, content)
    if found is None and skipped and not (folder / FINISHED).exists():
        raise no_usable_checkpoint(folder, skipped)
    return found, skipped


def no_usable_checkpoint(folder: Path, skipped: list[str]) -> ConfigError:
    """Return the error for a resume of a run that has checkpoints, but none that verifies.

    A start from the first step would replace them, and delete them in the end.
    """
    return ConfigError(
        f"resume: no checkpoint in {folder} can be used: {'; '.join(skipped)}. Nothing was changed. Restore "
        "one of them from a copy, or resume from a checkpoint of another folder (resume: PATH). Or start "
        "from the first step: give another project_name, or --overwrite, which deletes them."
    )


def newer_checkpoints(folder: Path, config: TrainConfig) -> list[Path]:
    """Return the checkpoints that are newer than the one of this folder that `resume` names."""
    if not isinstance(config.resume, str):
        return []
    start = Path(config.resume)
    if not Place.of(start.parent).is_same(Place.of(folder)):
        return []
    return [path for path in checkpoint_folders(folder) if step_of(path) > step_of(start)]


def set_aside_newer_checkpoints(folder: Path, config: TrainConfig) -> None:
    """Rename the checkpoints that are newer than the named one to set-aside-N-checkpoint-M.

    After `resume: checkpoint-5`, checkpoint-10 does not belong to the run any more. Without another name, a
    restart would use it as the newest.
    """
    for path in newer_checkpoints(folder, config):
        free = next(n for n in count(1) if not (folder / f"set-aside-{n}-{path.name}").exists())
        run_files.rename(folder, path.name, f"set-aside-{free}-{path.name}")
        say("note", f"{path} is newer than {config.resume}; it is kept as set-aside-{free}-{path.name}")


def write_record(folder: Path, settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """Write run.json: each value with its source, the versions, and the facts of this start.

    Returns what it records.
    """
    record = {"config": settings.listed(), "notes": settings.notes, **facts, "versions": versions()}
    run_files.write(folder, RECORD, json.dumps(record, indent=2) + "\n")
    return record
