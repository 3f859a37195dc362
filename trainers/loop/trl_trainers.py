"""The Trainer classes: those of TRL, and transformers' Trainer for mlm, on samples.

TRL tokenizes in the constructor of a trainer: in each rank, while the process group is open. Our samples are
ready before (data/prepare.py), so this step is skipped. sft skips it with skip_prepare_dataset, and TRL's
RewardTrainer recognises samples by itself; dpo, kto and orpo skip it here. planned_batches.py weighs the
losses of micro-batches; here are the forward of ORPO and the loss of mlm.

Other modules depend on TRL's internals too: planned_batches.py, and cpu_head.py, lora.py and
isolation_probe.py in model/.
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

# TRL's fused head scores only the labelled positions where it uses Triton (on GPUs). Elsewhere it scores all
# positions, for compilers that need fixed shapes. A CPU does not need them, so prompts and padding cost
# nothing there either.
replace_in(trl_utils, "_use_triton", lambda device: True)
# On a CPU, TRL's function for the scores spends more time in plain torch than in its matrix products.
replace_in(trl_utils, "_ChunkedLogProbFunction", Head)


class TokenizedSFTTrainer(Balanced, SFTTrainer):
    """SFTTrainer on samples with input_ids and labels."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with equal_weights():
            return super().compute_loss(*args, **kwargs)


class TokenizedRewardTrainer(Balanced, RewardTrainer):
    """RewardTrainer on samples with chosen_ids and rejected_ids, which TRL does not tokenize again."""


class TokenizedDPOTrainer(Balanced, DPOTrainer):
    """DPOTrainer on samples with prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedKTOTrainer(Padding, KTOTrainer):
    """KTOTrainer on samples with prompt_ids, completion_ids, KL_completion_ids and label."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenizedORPOTrainer(Balanced, ORPOTrainer):
    """ORPOTrainer on samples with prompt_ids, chosen_ids and rejected_ids.

    Its likelihood term is the mean over pairs of each pair's mean over tokens (arXiv 2403.07691, eq. 2 and
    6). TRL takes one mean over all tokens of a micro-batch instead, which would change with the batch size
    and the number of ranks. The term is the likelihood of the answer. With train_on: all, it includes the
    prompt, as in TRL.
    """

    def __init__(self, *args: Any, train_on_prompt: bool, **kwargs: Any) -> None:
        self.train_on_prompt = train_on_prompt
        self.tokens_seen = 0
        # The constructor maps over each dataset three times in each rank, so it gets only one sample.
        datasets = {name: kwargs[name] for name in ("train_dataset", "eval_dataset")}
        kwargs |= {name: rows and rows.select([0]) for name, rows in datasets.items()}
        super().__init__(*args, **kwargs)
        self.train_dataset, self.eval_dataset = datasets["train_dataset"], datasets["eval_dataset"]
        collate, self.data_collator = self.data_collator, lambda rows: collate([_labelled(r) for r in rows])
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        trl_utils.add_fused_lm_head(inner, outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        return _labelled(feature)

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Return the mean log-probabilities of the answers, the logits for the log, and the likelihood."""
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
    """Return a pair under the names that TRL's collator takes. The loss sees the answers."""
    out: dict[str, list[int]] = {}
    prompt = row["prompt_ids"]
    for side in ("chosen", "rejected"):
        ids = prompt + row[f"{side}_ids"]
        out[f"{side}_input_ids"] = ids
        out[f"{side}_attention_mask"] = [1] * len(ids)
        out[f"{side}_labels"] = [IGNORED] * len(prompt) + row[f"{side}_ids"]
    return out


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


class MaskedTrainer(Balanced, _OwnMean):
    """Trainer on samples with input_ids, which the collator masks."""
