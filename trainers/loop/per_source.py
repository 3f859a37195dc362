"""Evaluate each source of a mix, and all of them together, in one evaluation. A mixin for the trainers.

The batches of a source are those of a run that has only this source, so eval_NAME_loss is its eval_loss.
eval_loss is the mean over all tokens (or pairs) of all sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.loop.planned_batches import Padding


class PerSource(Padding):
    """A mixin, named first: evaluates one source after the other."""

    def __init__(self, *arguments: Any, spans: Mapping[str, Mapping[str, range]], **named: Any) -> None:
        """`spans`: of valid and test, where the samples of each source are; none without a mix."""
        self.spans = spans
        super().__init__(*arguments, **named)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader, or the loader of each source by its name."""
        own: Any = self.eval_dataset
        is_test = isinstance(eval_dataset, str) and eval_dataset == "test"
        part, data = ("test", own["test"]) if is_test else ("valid", own)
        sources = self.spans.get(part)
        load = super().get_eval_dataloader
        if not sources or not (eval_dataset is None or is_test or eval_dataset is own):
            return load(eval_dataset)
        return {name: load(data.select(span)) for name, span in sources.items()}

    def evaluation_loop(self, dataloader: Any, *arguments: Any, **named: Any) -> Any:
        if not isinstance(dataloader, dict):
            return super().evaluation_loop(dataloader, *arguments, **named)
        prefix = named["metric_key_prefix"]
        metrics: dict[str, float] = {}
        losses: dict[str, float] = {}
        total, weight, samples = 0.0, 0.0, 0
        for name, loader in dataloader.items():
            output = super().evaluation_loop(loader, *arguments, **named)
            losses[f"{prefix}_{name}_loss"] = loss = output.metrics[f"{prefix}_loss"]
            metrics |= output.metrics
            each = self.evaluated_weight(output)
            total, weight, samples = total + loss * each, weight + each, samples + output.num_samples
        metrics |= {f"{prefix}_loss": total / weight, **losses}
        kept: Any = type(output)  # transformers' EvalLoopOutput; nothing needs the predictions
        return kept(None, None, metrics, samples)
