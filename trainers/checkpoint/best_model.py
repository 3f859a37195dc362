"""Load the best model at the end: of the evaluated steps whose checkpoints verify. A mixin for Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint.resuming import Resuming
from trainers.rank.process import rank
from trainers.rank.say import say
from trainers.storage.manifest import CHECKPOINT_PREFIX


class BestModel(Resuming):
    """A mixin that chooses the best model. Durable (saving.py) adds saving."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.model_step: int | None = None  # step of the best model, once its weights are loaded

    def conclude(self) -> None:
        """Wait for a save in progress, if there is one."""
        raise NotImplementedError

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Look for the best model in any case. transformers does not if its folder is gone at a resume.

        The metrics of the training are those of all starts, and of all ranks.
        """
        self._tr_loss = torch.full_like(self._tr_loss, self.totals.mean_later_loss())
        if self.config.load_best_model_at_end and self.state.best_global_step:
            self.state.best_model_checkpoint = str(self._folder_of(self.state.best_global_step))
        return super()._finalize_training(trial, num_train_samples, start_time - self.totals.earlier_seconds)

    def _load_best_model(self) -> None:
        """Load the best model of those that verify: from a checkpoint, or keep that of the last step."""
        self.conclude()  # the best model may be in the checkpoint that is being written
        found = [entry for entry in self.state.log_history if "eval_loss" in entry]
        scores: dict[int, float] = self.agreement.from_rank_0(
            {int(entry["step"]): entry["eval_loss"] for entry in found}
        )
        for step in sorted(scores, key=lambda step: (scores[step], step)):
            if step == self.state.global_step:
                return  # it is in memory
            folder = self._folder_of(step)
            why = self._complaint(folder) if self.agreement.from_rank_0(folder.exists()) else "it is gone"
            if why is None:
                self.state.best_model_checkpoint, self.model_step = str(folder), step
                super()._load_best_model()
                return
            # save_total_limit does not delete the best. A step between two saves has no checkpoint.
            if rank() == 0 and step == self.state.best_global_step and self._saves_at(step):
                say(
                    "warning",
                    f"{folder} has the best model, but cannot be used: {why}. The next best is tried.",
                )
        self.state.best_model_checkpoint = None
        if rank() == 0:
            say("warning", "no checkpoint can be used: the model is that of the last step, not the best.")

    def _saves_at(self, step: int) -> bool:
        every = self.config.save_steps if self.config.save_strategy == "steps" else None
        return every is None or step % every == 0

    def _folder_of(self, step: int) -> Path:
        return self.run_folder / f"{CHECKPOINT_PREFIX}{step}"

    def _name_best(self, saving: int) -> None:
        """Let all ranks use the best checkpoint that rank 0 names.

        transformers checks on each rank whether the folder of the best step exists. One rank may see it and
        another may not. At the end some ranks would load the best model, and others would not. `saving` is
        the step of the checkpoint that is being written.
        """
        state, best = self.state, self.state.best_global_step
        if best:
            folder = self._folder_of(best)
            exists = best == saving or folder.exists()
            state.best_model_checkpoint = self.agreement.from_rank_0(
                str(folder) if exists else state.best_model_checkpoint
            )
