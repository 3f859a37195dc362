"""Checkpoints: what all ranks must agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState

from trainers.run_folder import CHECKPOINT_PREFIX


class AgreeOnBest(TrainerCallback):
    """After each save, all ranks take rank 0's word for which checkpoint is the best.

    transformers 5.23 asks each rank whether the folder of the best step exists, before a sharded backend has
    written it: one rank may see it and another not. At the end some would then load the best model and some
    not, and wait for each other forever; or all load an older one.
    """

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.best_global_step:
            return
        folder = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.best_global_step}"
        best = [str(folder) if folder.exists() else state.best_model_checkpoint]
        broadcast_object_list(best, from_process=0)
        state.best_model_checkpoint = best[0]
        if state.is_world_process_zero:
            newest = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
            state.save_to_json(
                str(newest / "trainer_state.json")
            )  # it was written before the answer was known
