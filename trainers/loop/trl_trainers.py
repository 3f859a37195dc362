"""The one place that reaches into TRL's trainers: they take tokenized rows, and losses that add up.

TRL tokenizes in the constructor of a trainer: in each rank, with the process group open. Our rows are ready
before (data/prepare.py), so that step is left out. If a release of TRL moves it, this file is what changes.
"""

from __future__ import annotations

from typing import Any

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.orpo import ORPOTrainer

from trainers.data.labels import IGNORED
from trainers.loop.planned_batches import Balanced, Padding
from trainers.model.cpu_head import Head, equal_weights
from trainers.rank.library_patches import replace_in

# TRL's fused head scores the labelled positions alone where Triton is at hand, and all of them elsewhere, for
# compilers that need fixed shapes. A CPU needs none: prompts and padding cost nothing there either.
replace_in(trl_utils, "_use_triton", lambda device: True)
# What it scores them with takes more time for its plain torch than for its matrix products on a CPU.
replace_in(trl_utils, "_ChunkedLogProbFunction", Head)


class TokenizedSFTTrainer(Balanced, SFTTrainer):
    """SFTTrainer on rows of input_ids and labels."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with equal_weights():
            return super().compute_loss(*args, **kwargs)


class TokenizedRewardTrainer(Balanced, RewardTrainer):
    """RewardTrainer on rows of chosen_ids and rejected_ids."""


class TokenizedDPOTrainer(Balanced, DPOTrainer):
    """DPOTrainer on rows of prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedKTOTrainer(Padding, KTOTrainer):
    """KTOTrainer on rows of prompt_ids, completion_ids, KL_completion_ids and label."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedORPOTrainer(Balanced, ORPOTrainer):
    """ORPOTrainer on rows of prompt_ids, chosen_ids and rejected_ids.

    Its likelihood term is the mean over pairs of each pair's mean over tokens (arXiv 2403.07691, eq. 2 and
    6), where TRL takes one mean over all tokens of a micro-batch: that would change with the batch size and
    the number of ranks. It is the likelihood of the answer, or with train_on: all of the prompt too, as TRL.
    """

    def __init__(self, *args: Any, train_on_prompt: bool, **kwargs: Any) -> None:
        self.train_on_prompt = train_on_prompt
        self.tokens_seen = 0
        # The constructor maps over its rows three times in each rank; one row is enough for it.
        datasets = {name: kwargs[name] for name in ("train_dataset", "eval_dataset")}
        kwargs |= {name: rows and rows.select([0]) for name, rows in datasets.items()}
        super().__init__(*args, **kwargs)
        self.train_dataset, self.eval_dataset = datasets["train_dataset"], datasets["eval_dataset"]
        collate, self.data_collator = self.data_collator, lambda rows: collate([_labelled(r) for r in rows])
        model: Any = self.model
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        trl_utils.add_fused_lm_head(whole, outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        return _labelled(feature)

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Mean log-probabilities of the answers, logits for the log, and the likelihood."""
        both = self.concatenated_inputs(
            batch, padding_value=self.padding_value, device=self.accelerator.device
        )
        ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
        answers, pairs = both["concatenated_labels"] != IGNORED, len(batch["chosen_labels"])
        asked = answers.clone()
        if self.train_on_prompt:
            asked[:pairs] = mask[:pairs].bool()
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        labels = ids.masked_fill(~asked, IGNORED)
        out = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True, **router)
        scored = answers[:, 1:]
        logps = (out.log_probs * scored).sum(1) / scored.sum(1)
        asked = asked[:pairs, 1:]
        nll = -((out.log_probs[:pairs] * asked).sum(1) / asked.sum(1)).mean()
        logits = out.mean_logits
        if model.training:
            self.tokens_seen += int(self.accelerator.reduce(mask.sum(), "sum"))
        extra = (out.aux_loss,) if self.aux_loss_enabled else ()
        chosen, rejected = logits[:pairs][scored[:pairs]], logits[pairs:][scored[pairs:]]
        return (logps[:pairs], logps[pairs:], chosen.mean(), rejected.mean(), nll, *extra)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.tokens_seen
        super().log(logs, start_time)


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    """A tokenized pair in the names of TRL's collator; the loss sees the answers."""
    out: dict[str, list[int]] = {}
    prompt = row["prompt_ids"]
    for side in ("chosen", "rejected"):
        ids = prompt + row[f"{side}_ids"]
        out[f"{side}_input_ids"] = ids
        out[f"{side}_attention_mask"] = [1] * len(ids)
        out[f"{side}_labels"] = [IGNORED] * len(prompt) + row[f"{side}_ids"]
    return out


def masked_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy summed over the masked tokens, divided by those of the whole step.

    The models of transformers take the mean over a micro-batch, which is wrong under accumulation
    (transformers#35203). logits: (batch, length, vocabulary); labels: (batch, length), -100 where not masked.
    """
    logits = outputs["logits"].float()
    total = torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORED, reduction="sum"
    )
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


class _OwnMean(Trainer):
    """Trainer that divides by its own tokens in evaluation.

    With a loss function of one's own, transformers divides by those of all ranks there too.
    """

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = masked_token_loss(model(**inputs), labels)
        return loss.detach(), None, None


class MaskedTrainer(Balanced, _OwnMean):
    """Trainer on rows of input_ids, masked when a batch is made."""
