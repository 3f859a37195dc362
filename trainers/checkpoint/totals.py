"""Sums over all steps of a run: a checkpoint keeps them, so that train_loss is that of the whole run.

transformers starts them from 0 at each start. So would the loss in the next log, a mean since the last one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from transformers import Trainer

from trainers.rank.agreement import Agreement


@dataclass
class Totals:
    """The sums up to a step, over all starts; the losses are means over the ranks."""

    logged_step: int = 0  # of the last log
    logged_loss: float = 0.0  # sum of the losses of the steps up to it
    later_loss: float = 0.0  # sum of those after it
    seconds: float = 0.0  # of training, without what a restart repeated


class Counting:
    """The totals of a trainer that is training."""

    def __init__(self, trainer: Trainer, agreement: Agreement) -> None:
        self.trainer, self.agreement = trainer, agreement
        self.earlier_seconds, self.began = 0.0, time.time()

    def begin(self, totals: dict[str, float]) -> None:
        """Continue from the totals of a checkpoint. Call it once transformers has set its own to 0."""
        self.began = time.time()
        if not totals:  # a checkpoint of an earlier version
            return
        then, trainer = Totals(**totals), self.trainer  # type: ignore[arg-type]  # JSON keeps int and float
        self.earlier_seconds = then.seconds
        trainer._initial_global_step = 0
        trainer._globalstep_last_logged = then.logged_step
        trainer._total_loss_scalar = then.logged_loss
        trainer._tr_loss = torch.full_like(trainer._tr_loss, then.later_loss)

    def now(self) -> dict[str, float]:
        """Return the totals at this step. All ranks call it together."""
        trainer = self.trainer
        seconds = self.earlier_seconds + time.time() - self.began
        last, logged = trainer._globalstep_last_logged, trainer._total_loss_scalar
        return asdict(Totals(last, logged, self.mean_later_loss(), seconds))

    def mean_later_loss(self) -> float:
        """Return the sum of the losses since the last log, as a mean over the ranks."""
        losses = self.agreement.gather(float(self.trainer._tr_loss))
        return sum(losses) / len(losses)
