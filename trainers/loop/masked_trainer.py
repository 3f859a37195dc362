"""The loss of a masked LM, on transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from trainers.data.labels import IGNORED
from trainers.loop.per_source import PerSource
from trainers.loop.planned_batches import Balanced


def masked_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the cross-entropy summed over the masked tokens, divided by their number in the full step.

    Without num_items_in_batch, the number is that of this micro-batch. The models of transformers take the
    mean over a micro-batch, which is wrong with gradient accumulation (transformers#35203).

    logits: (batch, length, vocabulary); labels: (batch, length), -100 where not masked.
    """
    logits = outputs["logits"].float()
    total = torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORED, reduction="sum"
    )
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


class _OwnMean(Trainer):
    """A Trainer that divides the loss of an evaluation by the masked tokens of the rank's own micro-batch.

    With a custom loss function, transformers divides by the tokens of all ranks in an evaluation too.
    """

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = masked_token_loss(model(**inputs), labels)
        return loss.detach(), None, None


class MaskedTrainer(PerSource, Balanced, _OwnMean):
    """Trainer on samples with input_ids, which the collator masks."""
