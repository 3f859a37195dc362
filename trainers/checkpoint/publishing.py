"""Rename a checkpoint once it is complete, and delete old checkpoints. Only rank 0 calls this."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainers.storage.manifest import Manifest, checkpoint_folders
from trainers.storage.run_folder import SAVING


def publish(part: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint into `saving/checkpoint-N`, then rename that to `checkpoint-N`.

    Raises:
        OSError: the disk is full, or a write fails.
    """
    run_folder = part.parent.parent
    target = run_folder / part.name
    manifest.write(part)
    if target.exists():  # of the same step: the run resumed from it, or it did not verify
        discard(target)
    part.rename(target)
    for folder in (target, run_folder):
        _sync_folder(folder)


def rotate(run_folder: Path, limit: int, best: str) -> None:
    """Keep the newest `limit` checkpoints and the best one. The newest verifies: it was hashed just now."""
    for folder in checkpoint_folders(run_folder)[:-limit]:
        if folder.name != best:
            discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a part of it never looks like a checkpoint."""
    old = folder.parent / SAVING / f"old-{folder.name}"
    shutil.rmtree(old, ignore_errors=True)
    old.parent.mkdir(exist_ok=True)
    folder.rename(old)
    shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
    """Sync a folder to the disk. Without this, a rename in it can be lost."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
