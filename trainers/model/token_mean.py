"""Let the loss of a step be the mean over all its tokens for each model.

The Trainer passes the number of tokens of a step to the model, whose loss divides by it. A model that also
takes images may declare that it does not take this number, because its loss leaves out what is masked. Then
each micro-batch would have the same weight, however many tokens it has. With text nothing is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainers.model.reach import without_weights
from trainers.rank.process import rank
from trainers.rank.say import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 5


def divide_by_all_tokens(model: PreTrainedModel) -> None:
    """Declare that a model takes the number of tokens of a step, if its loss divides by it.

    Call it before the Trainer is made, which reads `accepts_loss_kwargs`.
    """
    named: Any = model
    if getattr(named, "accepts_loss_kwargs", True):
        return
    if _divides(model):
        named.accepts_loss_kwargs = True
    elif rank() == 0:
        name = type(model).__name__
        say("note", f"loss: {name} takes the mean over each micro-batch, not over all tokens of a step")


def _divides(model: PreTrainedModel) -> bool:
    """Return whether the loss is a sum over the tokens, divided by the given number."""
    import torch

    ids = torch.arange(TOKENS)[None]
    with torch.no_grad(), without_weights(model) as empty:
        try:
            mean, total = (
                float(empty(input_ids=ids, labels=ids, use_cache=False, **count).loss)
                for count in ({}, {"num_items_in_batch": 1})
            )
        except Exception:  # a forward of any model: it may need more than ids, or take no such number
            return False
    return math.isclose(total, mean * (TOKENS - 1), rel_tol=1e-3)
