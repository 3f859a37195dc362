"""The run's folder: what lies where, whether it is free, and the record of the run.

<project_name>/                  final model, tokenizer, run.json, metrics.jsonl
<project_name>/checkpoint-N/     checkpoints, each whole; saving/ holds one that is being written
<project_name>/launch/attempt-K/ what the launcher generated, and each rank's log
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from itertools import count
from pathlib import Path
from typing import IO, Any

from trainers.config.errors import ConfigError
from trainers.config.packages import versions
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.rank.failures import knows_no_locks
from trainers.rank.protocol import LAUNCH, attempts, began
from trainers.rank.say import say
from trainers.storage.manifest import CHECKPOINT_PREFIX, checkpoint_folders, complaint, newest_usable, step_of
from trainers.storage.saved_model import ADAPTER

RECORD = "run.json"
METRICS = "metrics.jsonl"
PROGRESS = f"{LAUNCH}/progress.json"  # how far the run is, for `phalanx status`
LOCK = ".lock"
SAVING = "saving"  # a checkpoint lies in here until it is whole
TRACKER = "tracker.json"  # the id under which each start goes on with the same tracked run


def holds_run(folder: Path) -> bool:
    """Whether a run was started here before."""
    marks = (RECORD, f"{CHECKPOINT_PREFIX}*")
    return any(True for mark in marks for _ in folder.glob(mark)) or bool(_earlier_attempts(folder))


def _earlier_attempts(folder: Path) -> list[Path]:
    """Machine 0 marks an attempt; another machine of this start may have made its own files already."""
    return [attempt for attempt in attempts(folder).values() if began(attempt, machine=0)]


def check_free(folder: Path, config: TrainConfig) -> None:
    """Refuses a folder that holds another run, unless the config resumes or overwrites it.

    Raises:
        ConfigError: the folder is taken, or there is nothing to resume.
    """
    for part in (folder, *folder.parents):
        if part.is_file():
            raise ConfigError(f"project_name: {part} is a file. Give another name.")
    if holds_run(folder) and not (config.resume or config.overwrite):
        raise ConfigError(
            f"project_name: {folder} holds another run. Go on with it: --resume. "
            "Start anew: --overwrite (deletes it). Or give another project_name."
        )
    if config.resume:
        resume_checkpoint(folder, config, content=False)


class InUse(ConfigError):
    """Another process has the run's folder."""


def hold(folder: Path) -> IO[str]:
    """Keeps the folder for this process, until it ends: two runs in one folder would ruin both.

    Raises:
        InUse: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "just started"
        raise InUse(
            f"project_name: {folder} is in use: a run is going on there ({owner}). "
            "Wait for its end, stop it, or give another project_name."
        ) from None
    except OSError as error:
        if not knows_no_locks(error):
            raise
        say("note", f"{folder} cannot be locked ({error.strerror}); start no second run there")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.append(file)
    return file


def holder(folder: Path) -> tuple[int, str] | None:
    """The process that holds the folder, and its machine (0 and "" where it has just begun); None if free.

    Without locks only a process of this machine is known.
    """
    path = folder / LOCK
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if not isinstance(error, BlockingIOError) and not knows_no_locks(error):
                raise
            _, pid, _, host = (file.read().split() or ["", "0", "", ""])[:4]
            alive = host == socket.gethostname() and Path("/proc", pid).exists()
            return (int(pid), host) if isinstance(error, BlockingIOError) or alive else None


def release() -> None:
    """Lets go of what this process holds."""
    while _held:
        _held.pop().close()


_held: list[IO[str]] = []  # a file that is collected is closed, and its lock with it


def claim(folder: Path, config: TrainConfig) -> None:
    """Makes the folder this run's own.

    With overwrite, deletes what the earlier run left, and nothing else.
    """
    check_free(folder, config)
    if config.overwrite and holds_run(folder):
        for attempt in _earlier_attempts(folder):
            shutil.rmtree(attempt)
        for path in [*checkpoint_folders(folder), *folder.glob("set-aside-*")]:
            if not path.is_symlink():
                shutil.rmtree(path)
        for path in folder.iterdir():
            if path.name in (RECORD, METRICS, TRACKER):
                path.unlink()
        shutil.rmtree(folder / SAVING, ignore_errors=True)
        remove_model(folder)
    folder.mkdir(parents=True, exist_ok=True)
    set_aside_later(folder, config)


def remove_model(folder: Path) -> None:
    """Removes the final model that an earlier start left, adapter or whole."""
    for path in folder.iterdir():
        if path.name.endswith((".safetensors", ".safetensors.index.json", ADAPTER)) or (
            path.name == "config.json"
        ):
            path.unlink()


def resume_checkpoint(
    folder: Path, config: TrainConfig, content: bool = True
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: from the start), and why newer ones were passed over.

    Without `content` the files are not read, only their names and sizes are.

    Raises:
        ConfigError: resume was asked for, and no run lies here; or the named checkpoint does not verify.
    """
    if not config.resume:
        return None, []
    if isinstance(config.resume, str):
        path = Path(config.resume)
        if not path.name.removeprefix(CHECKPOINT_PREFIX).isdigit():
            raise ConfigError(f"resume: {path} is not a checkpoint: a folder checkpoint-N of a run.")
        if not path.is_dir():
            raise ConfigError(f"resume: {path} does not exist. resume: true takes the newest that verifies.")
        if why := complaint(path, content):
            raise ConfigError(
                f"resume: {path} cannot be used: {why}. resume: true takes the newest that can."
            )
        return path, []
    if not holds_run(folder):
        raise ConfigError(f"resume: there is no run in {folder}. Start without --resume.")
    return newest_usable(folder, content)


def set_aside_later(folder: Path, config: TrainConfig) -> None:
    """After `resume: checkpoint-5`, checkpoint-10 is of a past that is left; it gets another name.

    Else a restart would take it for the newest.
    """
    if not isinstance(config.resume, str):
        return
    start = Path(config.resume)
    if start.resolve().parent != folder.resolve():
        return
    for path in checkpoint_folders(folder):
        if step_of(path) > step_of(start):
            free = next(n for n in count(1) if not (folder / f"set-aside-{n}-{path.name}").exists())
            path.rename(folder / f"set-aside-{free}-{path.name}")


def write_record(folder: Path, settings: Settings, facts: dict[str, Any]) -> None:
    """Writes run.json: each value with where it came from, the versions, and the facts of this start."""
    config = {
        name: {"value": value, "source": settings.sources[name]} for name, value in settings.public().items()
    }
    record = {"config": config, "notes": settings.notes, **facts, "versions": versions()}
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all: it may be read at any moment, and the run killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
