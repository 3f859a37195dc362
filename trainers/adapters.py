"""The one place that reaches into TRL's trainers: they take tokenized rows, and losses that add up.

TRL tokenizes in the constructor of a trainer: in each rank, with the process group open. Our rows are ready
before (trainers/data.py), so that step is left out. If a release of TRL moves it, this file is what changes.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer
from trl.experimental.orpo import ORPOTrainer


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on rows of prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedKTOTrainer(KTOTrainer):
    """KTOTrainer on rows of prompt_ids, completion_ids, KL_completion_ids and label."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedORPOTrainer(ORPOTrainer):
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

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        return _labelled(feature)

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        rest: list[Any]
        chosen_logps, rejected_logps, chosen_logits, *rest = super().concatenated_forward(model, batch)
        nll = -chosen_logps.mean()
        if self.train_on_prompt:
            ids: Any = batch["chosen_input_ids"].masked_fill(batch["chosen_attention_mask"] == 0, -100)
            likelihood = self.get_batch_logps(
                chosen_logits[:, : ids.shape[1] - 1],  # type: ignore[arg-type]
                ids[:, 1:],
                average_log_prob=True,
                is_encoder_decoder=True,  # that is: the labels are shifted already
            )
            nll = -likelihood.mean()
        rest[1] = nll
        if model.training:
            seen = batch["chosen_attention_mask"].sum() + batch["rejected_attention_mask"].sum()
            self.tokens_seen += int(self.accelerator.reduce(seen, "sum"))
        return (chosen_logps, rejected_logps, chosen_logits, *rest)

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
        out[f"{side}_labels"] = [-100] * len(prompt) + row[f"{side}_ids"]
    return out


def masked_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy summed over the masked tokens, divided by those of the whole step.

    The models of transformers take the mean over a micro-batch, which is wrong under accumulation
    (transformers#35203). logits: (batch, length, vocabulary); labels: (batch, length), -100 where not masked.
    """
    logits = outputs["logits"].float()
    total = torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100, reduction="sum"
    )
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


class MaskedTrainer(Trainer):
    """Trainer whose evaluation weighs each rank alike.

    With a loss function of one's own, transformers divides by the tokens of all ranks in evaluation too;
    where the last step is not full, it then keeps the losses of some ranks only, and the mean is wrong.
    """

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = masked_token_loss(model(**inputs), labels)
        return loss.detach(), None, None
