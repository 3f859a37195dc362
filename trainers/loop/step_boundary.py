"""The step boundary: what all ranks agree on between two optimiser steps.

The ranks exchange a few numbers per step (rank/agreement.py): whether a rank was asked to stop, whether it is
time to save, whether a value was not finite, and whether a rank still writes the last checkpoint. So all
ranks do the same at the same step.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trainers.checkpoint.saving import Durable, StopTraining
from trainers.rank.failures import NotFinite
from trainers.rank.heartbeat import STEP, heart
from trainers.rank.process import rank
from trainers.rank.protocol import JOB_END
from trainers.rank.say import say
from trainers.rank.signals import stop
from trainers.storage.manifest import read_manifest

LIMIT_MARGIN = 45.0  # seconds, in addition to a step and a save: to agree, to end, to be requeued


class StepBoundary(TrainerCallback):
    """A callback for the step boundary. It must be the last one, to see what transformers' own decided."""

    def __init__(self, trainer: Durable, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint
        self.stopping = False
        self.saved_at = time.monotonic()
        end = os.environ.get(JOB_END)
        self.ends_at = float(end) if end else None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop.training()
        manifest = read_manifest(self.checkpoint) if self.checkpoint is not None else None
        self.trainer.totals.begin(manifest.totals if manifest is not None else {})
        self._stop_if_asked()
        if manifest is None or not manifest.position["evaluation_due"]:
            return
        # The run was stopped during the evaluation of this step, or before it. Evaluate now, with the effect
        # on the best model.
        control.should_evaluate = True
        trainer = self.trainer
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss, None, kwargs["model"], None, state.epoch, None, 0.0
        )
        control.should_evaluate = False
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(self.checkpoint)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.watch.begin(state.global_step + 1)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        heart.stepped(state.global_step)
        asked, due, bad, writing = trainer.agreement.maximum(
            self._asked(), self._minutes_passed(), trainer.watch.end(), trainer.is_saving
        )
        stop.agreed(asked)
        if bad:
            self._refuse(state)
        if trainer.has_unpublished_save and not writing:
            trainer.conclude()
        control.should_save |= bool(due)
        if asked and state.global_step < state.max_steps:
            self._begin_to_stop(args, state, control)
        elif control.should_save or _ends_epoch(state):
            self._settle(state)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopping:
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        heart.enter(STEP)
        self._stop_if_asked(evaluating=self.trainer.is_in_train)  # else it is that on the test split

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()
        if self.stopping:
            raise StopTraining

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        heart.enter("end")
        self.trainer.conclude()

    def _asked(self) -> int:
        """Return the signal that asks this rank to stop, or 0.

        If the end of the job is near, this is the signal that the scheduler sends as a warning.
        """
        if stop.requested or rank() != 0 or self.ends_at is None:
            return stop.requested
        left = self.ends_at - time.time()
        needed = LIMIT_MARGIN + 2 * (self.trainer.save_seconds + max(heart.recent, default=0.0))
        if left > needed:
            return 0
        say("time limit", f"the job ends in {left:.0f} s; the ranks save and stop")
        return signal.SIGUSR1

    def _minutes_passed(self) -> int:
        """Return 1 if it is time to save by save_minutes, else 0. Only the clock of rank 0 counts."""
        minutes = self.trainer.config.save_minutes
        return int(minutes is not None and rank() == 0 and time.monotonic() - self.saved_at >= 60 * minutes)

    def _begin_to_stop(self, args: Any, state: TrainerState, control: TrainerControl) -> None:
        """Save at this step and stop, without an evaluation. If one is due, a resume does it."""
        self._settle(state)
        self.stopping = True
        self.trainer.due_evaluation = control.should_evaluate or (
            args.eval_strategy == "epoch" and _ends_epoch(state)
        )
        control.should_evaluate, control.should_save = False, True

    def _stop_if_asked(self, evaluating: bool = False) -> None:
        asked, _ = self.trainer.agreement.maximum(self._asked(), 0)
        stop.agreed(asked)
        if asked:
            self.trainer.due_evaluation = evaluating
            raise StopTraining

    def _settle(self, state: TrainerState) -> None:
        """Wait for the GPU, and check that its results are finite, before anything is saved."""
        if self.trainer.agreement.maximum(self.trainer.watch.wait())[0]:
            self._refuse(state)

    def _refuse(self, state: TrainerState) -> None:
        """Write the batches that were not finite, and raise NotFinite on all ranks."""
        trainer = self.trainer
        path = trainer.watch.write(trainer.run_folder, trainer.processing_class)
        places = [str(place) for place in trainer.agreement.gather(path) if place]
        raise NotFinite(
            f"the loss or the gradient norm is NaN or infinite at step {trainer.watch.bad_step}; the "
            f"step was not saved. The batches that caused it: {', '.join(places)}."
        )


def _ends_epoch(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()
