"""TRL's trainers for sft, reward, dpo and kto, on samples.

orpo_trainer.py has the trainer for orpo, masked_trainer.py that for mlm.

TRL tokenizes in the constructor of a trainer: in each rank, while the process group is open. Our samples are
ready before (data/prepare.py), so this step is skipped. sft skips it with skip_prepare_dataset, and TRL's
RewardTrainer recognises samples by itself; dpo and kto skip it here. planned_batches.py weighs the losses of
micro-batches.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from trainers.loop.per_source import PerSource
from trainers.loop.planned_batches import Balanced
from trainers.model.cpu_head import equal_weights


class TokenizedSFTTrainer(PerSource, Balanced, SFTTrainer):
    """SFTTrainer on samples with input_ids and labels."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with equal_weights():
            return super().compute_loss(*args, **kwargs)


class TokenizedRewardTrainer(PerSource, Balanced, RewardTrainer):
    """RewardTrainer on samples with chosen_ids and rejected_ids, which TRL does not tokenize again."""


class TokenizedDPOTrainer(PerSource, Balanced, DPOTrainer):
    """DPOTrainer on samples with prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedKTOTrainer(PerSource, KTOTrainer):
    """KTOTrainer on samples with prompt_ids, completion_ids, KL_completion_ids and label."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset
