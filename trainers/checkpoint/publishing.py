"""Gives a checkpoint its name when it is complete, and deletes what is no longer kept. For rank 0 only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainers.storage.manifest import Manifest, checkpoint_folders
from trainers.storage.run_folder import SAVING


def publish(part: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint into `saving/checkpoint-N`, then rename that to `checkpoint-N`.

    Raises:
        OSError: the disk is full, or does not take it.
    """
    run_folder = part.parent.parent
    target = run_folder / part.name
    manifest.write(part)
    if target.exists():  # of the same step: the run went on from it, or it did not verify
        discard(target)
    part.rename(target)
    for folder in (target, run_folder):
        _sync_folder(folder)


def rotate(run_folder: Path, limit: int, best: str) -> None:
    """Keep the newest `limit` checkpoints and the best one; the newest was hashed just now."""
    for folder in checkpoint_folders(run_folder)[:-limit]:
        if folder.name != best:
            discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. Half-deleted it must not look like one, so it loses its name first."""
    old = folder.parent / SAVING / f"old-{folder.name}"
    shutil.rmtree(old, ignore_errors=True)
    old.parent.mkdir(exist_ok=True)
    folder.rename(old)
    shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
