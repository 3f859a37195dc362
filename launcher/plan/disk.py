"""Check before a run starts that its disk has room for what it will still write."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from launcher.plan.memory import predict_disk, predict_merged, size_of_model
from trainers.config.json_text import parse_json
from trainers.config.on_resume import same_length
from trainers.config.schema import TrainConfig
from trainers.config.text import count_of, format_bytes
from trainers.rank.say import say
from trainers.storage.ending import MERGE, read_ending
from trainers.storage.manifest import checkpoint_folders, read_manifest
from trainers.storage.resumed import has_steps_left, read_record
from trainers.storage.run_folder import resume_checkpoint

STATE = "trainer_state.json"  # of transformers, in each checkpoint


def check_disk(folder: Path, train: TrainConfig) -> None:
    """Check that the run's file system has room for what is left to write, as predicted.

    Raises:
        ConfigError: finished.json is damaged.
        OSError: there is less room; the message says what is needed.
    """
    parameters = size_of_model(train.model)
    if parameters is None:
        return
    checkpoint, model, name = _left_to_write(folder, train, parameters)
    existing = next(part for part in (folder.resolve(), *folder.resolve().parents) if part.is_dir())
    free = shutil.disk_usage(existing).free
    if train.overwrite:  # the old checkpoints are deleted first
        free += sum(_size(old) for old in checkpoint_folders(folder))
    if checkpoint + model > free:
        needs = f"{name} needs about {format_bytes(model)}"
        if checkpoint:
            needs = f"a checkpoint of this run needs about {format_bytes(checkpoint)}, and {needs}"
        raise OSError(
            errno.ENOSPC,
            f"project_name: {needs} (predicted), but {existing} has only {format_bytes(free)} free. Free "
            "some space, or give a project_name on another disk",
        )
    at_most = (train.save_total_limit + 1) * checkpoint + model  # one more while it is written
    if checkpoint and at_most > free:
        say(
            "warning",
            f"project_name: {count_of(train.save_total_limit, 'checkpoint')} of this run, the one that is "
            f"being written and its final model need about {format_bytes(at_most)} (predicted), but "
            f"{existing} has {format_bytes(free)} free. Old checkpoints are deleted earlier, or saves are "
            "skipped. Lower save_total_limit, or free some space.",
        )


def _left_to_write(folder: Path, train: TrainConfig, parameters: int) -> tuple[int, int, str]:
    """Return the bytes of a checkpoint (0: none will be saved), and of the model, and what model it is."""
    checkpoint, model = predict_disk(parameters, train)
    name = "its final model" if checkpoint else "the final model"
    if not train.resume:
        return checkpoint, model, name
    ending = read_ending(folder) if train.resume is True else None
    last_step = train.max_steps if train.max_steps > 0 else None
    if ending is not None and not has_steps_left(folder, ending, read_record(folder), train, last_step):
        if ending.why_damaged(folder, content=False) is not None:
            return 0, model, "the final model"  # it is saved again
        merges = train.merge_adapter and MERGE not in ending.done
        return 0, predict_merged(parameters, train) if merges else 0, "the merged model"
    start, _ = resume_checkpoint(folder, train, content=False)
    if start is not None and _is_of_last_step(start, train):
        return 0, model, "the final model"
    return checkpoint, model, name


def _is_of_last_step(checkpoint: Path, train: TrainConfig) -> bool:
    """Return whether a run that continues from a checkpoint trains nothing. If this is not known: False."""
    manifest = read_manifest(checkpoint)
    if train.max_steps > 0:
        return manifest.step >= train.max_steps
    if manifest.config is None or not same_length(manifest.config, train):
        return False
    try:
        state = parse_json((checkpoint / STATE).read_text(encoding="utf-8"))
        return bool(manifest.step >= state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files. Another machine of this start may delete some meanwhile."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.lstat(os.path.join(path, name)).st_size
    return size
