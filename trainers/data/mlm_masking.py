"""Masks tokens for masked language modelling: drawn for each row and epoch, not for each rank.

The same row is masked alike whatever the batch, the rank or the number of workers, so that a run can be
compared and resumed; and differently in each epoch, as RoBERTa does (arXiv 1907.11692). Of the tokens that
are chosen, 80 % become the mask token, 10 % another token and 10 % stay (BERT, arXiv 1810.04805).
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
    """Collates rows of `input_ids` and `row`; as a callback it learns which epoch it is.

    A negative `row` marks one of evaluation: it is masked alike at every evaluation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        self.tokenizer, self.probability, self.seed = tokenizer, probability, seed
        self.special = np.asarray(tokenizer.all_special_ids)
        self.epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        masked = [self.mask(np.asarray(row["input_ids"]), int(row["row"])) for row in rows]
        batch = self.tokenizer.pad(
            {"input_ids": [ids.tolist() for ids, _ in masked]}, padding_side="right", return_tensors="pt"
        )
        labels = batch["input_ids"].new_full(batch["input_ids"].shape, IGNORED)
        for index, (_, own) in enumerate(masked):
            labels[index, : len(own)] = labels.new_tensor(own)
        return {**batch, "labels": labels}

    def mask(self, ids: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids that the model sees, and the labels: -100 where nothing is asked."""
        epoch = self.epoch if row >= 0 else 0
        random = np.random.default_rng((self.seed, epoch, int(row >= 0), abs(row)))
        free = np.flatnonzero(~np.isin(ids, self.special))
        asked = free[random.random(len(free)) < self.probability]
        if not len(asked):  # a short row would teach nothing
            asked = free[random.integers(len(free), size=1)]
        labels = np.full(len(ids), IGNORED)
        labels[asked] = ids[asked]
        kind = random.random(len(asked))
        seen = ids.copy()
        seen[asked[kind < 0.8]] = self.tokenizer.mask_token_id
        other = asked[kind >= 0.9]
        seen[other] = random.integers(len(self.tokenizer), size=len(other))
        return seen, labels
