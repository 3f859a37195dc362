"""Rename a checkpoint once it is complete, and decide which old checkpoints are deleted. On rank 0 only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainers.rank.no_links import follow_umask
from trainers.storage import run_files
from trainers.storage.manifest import (
    Manifest,
    checkpoint_folders,
    is_foreign,
    newest_usable,
    step_of,
    why_unusable,
)
from trainers.storage.run_folder import SAVING


def publish(part: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint into `saving/checkpoint-N`, then rename that to `checkpoint-N`.

    Raises:
        OSError: the disk is full, or a write fails.
    """
    run_folder = part.parent.parent
    target = run_folder / part.name
    follow_umask(part)
    manifest.write(part)
    if os.path.lexists(target):  # of the same step: the run resumed from it, or it did not verify
        if _is_own(target):
            discard(target)
        else:
            run_files.keep(run_folder, target.name)
    run_files.rename(run_folder, f"{SAVING}/{part.name}", part.name)
    for folder in (target, run_folder):
        _sync_folder(folder)


def rotate(run_folder: Path, saved: int, limit: int, best: str) -> None:
    """Keep the checkpoint of step `saved`, `limit` in all that verify, and the best one.

    That of `saved` was hashed just now, so whatever else is damaged, one is left that verifies. A higher step
    is not a newer save: the run did not resume from it. It is deleted only if it does not verify.

    A checkpoint that someone copied into the folder is not of this run, and stays.
    """
    kept = 0
    for folder in reversed(checkpoint_folders(run_folder)):
        if not _is_own(folder):
            continue
        above = step_of(folder) > saved
        if folder.name == best or (above and why_unusable(folder, content=True) is None):
            kept += not above
        elif above or kept >= limit or why_unusable(folder, content=False) is not None:
            discard(folder)
        else:
            kept += 1


def make_room(run_folder: Path, needed: int, best: str) -> list[Path]:
    """Delete the oldest checkpoints until the disk has `needed` bytes. Return those that were deleted.

    The newest that verifies is kept, and the best one. Without one that verifies, all are kept.
    """

    def has_room() -> bool:
        return shutil.disk_usage(run_folder).free >= needed

    if has_room():  # before each save: a checkpoint is read only if another one must go
        return []
    newest, _ = newest_usable(run_folder, content=True)
    deleted: list[Path] = []
    for folder in checkpoint_folders(run_folder) if newest is not None else []:
        kept = folder in (newest, run_folder / best) or not _is_own(folder)
        if not kept and not has_room():
            discard(folder)
            deleted.append(folder)
    return deleted


def _is_own(folder: Path) -> bool:
    """Return whether its run wrote a checkpoint. A copy from another run may have the name of an own one."""
    return run_files.owns(folder.parent, folder.name) and not is_foreign(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a part of it never looks like a checkpoint."""
    run, old = folder.parent, f"{SAVING}/old-{folder.name}"
    run_files.make_folder(run, SAVING)
    run_files.remove(run, old)
    run_files.rename(run, folder.name, old)
    run_files.remove(run, old)


def _sync_folder(folder: Path) -> None:
    """Sync a folder to the disk. Without this, a rename in it can be lost."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
