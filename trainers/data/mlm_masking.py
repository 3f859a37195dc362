"""Mask tokens for masked language modelling. The mask depends on the sample and the epoch, not on the rank.

The mask of a sample is the same for any batch, rank and number of workers, so that a run can be compared and
resumed. It differs in each epoch, as in RoBERTa (arXiv 1907.11692). Of the chosen tokens, 80 % become the
mask token, 10 % become a random token, and 10 % stay as they are (BERT, arXiv 1810.04805).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from trainers.data.labels import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class MaskTokens(TrainerCallback):
    """A collator for samples with `input_ids` and `number`. It is also a callback, which tells it the epoch.

    `number` is that of the sample in its split, or in the mix of an epoch (planned_batches.py). It is
    negative for the samples of an evaluation, which have the same mask at every evaluation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        self.tokenizer, self.probability, self.seed = tokenizer, probability, seed
        self.special = np.asarray(tokenizer.all_special_ids)
        self.epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        masked = [self.mask(np.asarray(sample["input_ids"]), int(sample["number"])) for sample in samples]
        batch = self.tokenizer.pad(
            {"input_ids": [ids.tolist() for ids, _ in masked]}, padding_side="right", return_tensors="pt"
        )
        labels = batch["input_ids"].new_full(batch["input_ids"].shape, IGNORED)
        for index, (_, own) in enumerate(masked):
            labels[index, : len(own)] = labels.new_tensor(own)
        return {**batch, "labels": labels}

    def mask(self, ids: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that the model sees, and the labels: -100 where it need not predict."""
        epoch = self.epoch if number >= 0 else 0
        random = np.random.default_rng((self.seed, epoch, int(number >= 0), abs(number)))
        free = np.flatnonzero(~np.isin(ids, self.special))
        chosen = free[random.random(len(free)) < self.probability]
        if not len(chosen):  # may happen in a short sample, which then has no loss
            chosen = free[random.integers(len(free), size=1)]
        labels = np.full(len(ids), IGNORED)
        labels[chosen] = ids[chosen]
        kind = random.random(len(chosen))
        seen = ids.copy()
        seen[chosen[kind < 0.8]] = self.tokenizer.mask_token_id
        other = chosen[kind >= 0.9]
        seen[other] = random.integers(len(self.tokenizer), size=len(other))
        return seen, labels
