"""DeepSpeed's part of a checkpoint: its shards, as its engine writes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trainers.rank.process import rank

Tolerating = Callable[[], AbstractContextManager[None]]


def save(engine: Any, folder: Path, step: int, tolerating: Tolerating, trains_all: bool) -> None:
    """Writes the shards of this rank.

    DeepSpeed waits for all ranks after it has written, so no rank may leave it before. That is why a full
    disk is borne in each of its writes, and what rank 0 alone writes comes after: `latest`, which a load
    looks for. The scripts that it copies are what `phalanx consolidate` does.
    """
    engine.checkpoint_engine = _tolerant(engine, tolerating)
    engine._copy_recovery_script = lambda _: None
    tag = f"global_step{step}"
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=not trains_all)
    if rank() == 0:
        (folder / "latest").write_text(tag, encoding="utf-8")


def _tolerant(engine: Any, tolerating: Tolerating) -> Any:
    """DeepSpeed's writer of files, within `tolerating`."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Tolerant(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
        def save(self, state_dict: Any, path: str) -> None:
            with tolerating():
                super().save(state_dict, path)

    return Tolerant(engine._config)
