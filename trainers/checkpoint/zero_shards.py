"""The shards of DeepSpeed in a checkpoint, as its engine writes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trainers.rank.process import rank

Tolerating = Callable[[], AbstractContextManager[None]]


def save(engine: Any, folder: Path, step: int, tolerating: Tolerating, trains_all: bool) -> None:
    """Write the shards of this rank.

    DeepSpeed waits for all ranks after its writes, so no rank may leave save_checkpoint early. Therefore each
    of its writes tolerates a full disk, and `latest`, which only rank 0 writes and a load needs, is written
    afterwards. DeepSpeed's recovery script is not copied, since `phalanx consolidate` does the same.
    """
    engine.checkpoint_engine = _tolerant(engine, tolerating)
    engine._copy_recovery_script = lambda _: None
    tag = f"global_step{step}"
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=not trains_all)
    if rank() == 0:
        (folder / "latest").write_text(tag, encoding="utf-8")


def _tolerant(engine: Any, tolerating: Tolerating) -> Any:
    """Return DeepSpeed's writer of files, with each write inside `tolerating`."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Tolerant(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
        def save(self, state_dict: Any, path: str) -> None:
            with tolerating():
                super().save(state_dict, path)

    return Tolerant(engine._config)
