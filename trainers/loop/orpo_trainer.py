"""ORPO's loss (arXiv 2403.07691), on TRL's ORPOTrainer."""

from __future__ import annotations

from typing import Any

from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trainers.data.labels import IGNORED
from trainers.loop.per_source import PerSource
from trainers.loop.planned_batches import Balanced


class TokenizedORPOTrainer(PerSource, Balanced, ORPOTrainer):
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
        add_fused_lm_head(inner, outputs=("log_probs", "mean_logits"))

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
