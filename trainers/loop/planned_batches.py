"""Mixins for the trainers: planned micro-batches, and a loss that does not depend on the plan.

Micro-batches differ in size when they are filled to a token budget, and at the end of an epoch. TRL's
preference trainers take the mean over each micro-batch, so a pair in a small one would have more weight. Here
the loss of a step is the mean over all its pairs (or tokens), and the loss of an evaluation is the mean over
all its pairs (or tokens), on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trainers.checkpoint.saving import Durable
from trainers.data.collators import FlatCollator, PieceDataset
from trainers.data.labels import IGNORED
from trainers.data.packing import Ints
from trainers.data.sampler import Batches, plan_batches, sample_lengths
from trainers.model.padding_free import padded

SAMPLES = "samples"  # the number of samples in a micro-batch; the collator adds it, the model never sees it


@dataclass
class CountSamples:
    """A collator that adds the number of samples.

    An empty micro-batch gets a stand-in sample, which does not count in the loss.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    stand_in: dict[str, Any]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {**self.collate(samples or [self.stand_in]), SAMPLES: len(samples)}
        if not samples and "labels" in batch:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


class Padding(Durable):
    """A mixin, named before the Trainer class: pads the micro-batches of an evaluation if the config asks."""

    @property
    def pads_evaluation(self) -> bool:
        """Whether samples that are packed in training are padded in an evaluation."""
        return self.config.packed != "none" and not self.config.evaluates_packed

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        with padded(self.pads_evaluation):
            return super().evaluation_loop(*arguments, **named)

    def evaluated_weight(self, output: Any) -> float:
        """Return how many samples the loss of an evaluation is the mean of."""
        return float(output.num_samples)


class Balanced(Padding):
    """A mixin, named before the Trainer class: planned micro-batches, exact means."""

    def plan_batches(self, lengths: Ints, training: bool) -> Batches:
        """Return the micro-batches for samples of these lengths."""
        model: Any = self.model
        hidden = model.config.get_text_config().hidden_size
        return plan_batches(self.config, hidden, self.args.world_size, lengths, training)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._planned(self.train_dataset, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        own: Any = self.eval_dataset
        chosen = own[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return self._planned(own if chosen is None else chosen, training=False)

    def _planned(self, dataset: Any, training: bool) -> DataLoader[Any]:
        batches = self.plan_batches(sample_lengths(dataset), training)
        if training:
            self.remove_callback(Batches)  # of an earlier loader, such as the one that last_step counts
            self.add_callback(batches)
        numbers = None
        if self.config.kind.rows == "masked":  # the mask depends on it, not on the rank
            numbers = range(len(dataset)) if training else range(-1, -1 - len(dataset), -1)
        pieces: Any = PieceDataset(dataset, batches.pieces, numbers)
        loader: DataLoader[Any] = DataLoader(
            pieces,
            batch_sampler=batches,
            collate_fn=self._collator(pieces[0], training),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _collator(self, stand_in: dict[str, Any], training: bool) -> CountSamples:
        collate: Any = self.data_collator
        tokenizer: Any = self.processing_class
        if not training and self.pads_evaluation and isinstance(collate, FlatCollator):
            collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
        return CountSamples(collate, stand_in)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if batch_samples and SAMPLES in batch_samples[0] and "labels" not in batch_samples[0]:
            self._samples_of_step = sum(self._of_all_ranks(sum(batch[SAMPLES] for batch in batch_samples)))
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        samples = inputs.pop(SAMPLES, None)  # prediction_step has removed it already
        arguments = (model, inputs, return_outputs, num_items_in_batch)
        if samples is None or "labels" in inputs:  # already divided by the tokens of the full step
            return super().compute_loss(*arguments)
        with self._uneven(samples):
            loss = super().compute_loss(*arguments)
        ranks_and_batches = self.args.world_size * self.current_gradient_accumulation_steps
        return loss * (samples * ranks_and_batches / self._samples_of_step)

    def prediction_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
        samples, labels = inputs.pop(SAMPLES), inputs.get("labels")
        weight = samples
        if labels is not None:
            weight = int(((labels[..., 1:] if self._loss_shifts_labels else labels) != IGNORED).sum())
        # With a loss over tokens, TRL gathers one number per rank.
        with self._uneven(samples) if labels is None else nullcontext():
            result: Any = super().prediction_step(model, inputs, *others, **named)
        self._evaluated[0] += float(result[0]) * weight if weight else 0.0
        self._evaluated[1] += weight
        return result

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        self._evaluated = [0.0, 0.0]  # sum of losses, number of tokens or samples
        output = super().evaluation_loop(*arguments, **named)
        sums = torch.tensor(self._evaluated, dtype=torch.float64, device=self.args.device)
        total, weight = self._evaluated = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{named['metric_key_prefix']}_loss"] = total / weight
        return output

    def evaluated_weight(self, output: Any) -> float:
        """Return how many tokens (or samples) the loss of an evaluation is the mean of."""
        return self._evaluated[1]

    def _of_all_ranks(self, number: int) -> list[int]:
        """Return the number of each rank."""
        if self.args.world_size == 1:
            return [number]
        numbers: torch.Tensor = self.accelerator.gather(torch.tensor([number], device=self.args.device))
        return numbers.tolist()

    @contextmanager
    def _uneven(self, samples: int) -> Iterator[None]:
        """Let TRL gather one number per sample while the ranks have different numbers of samples."""
        counts = self._of_all_ranks(samples)
        if len(set(counts)) == 1:
            yield
            return
        gather, longest = self.accelerator.gather, max(counts)

        def gather_rows(tensor: torch.Tensor) -> Any:
            if tensor.dim() == 0:
                return gather(tensor)
            each = tensor.shape[0] // max(samples, 1)  # 2 where chosen and rejected are in one tensor
            filled = tensor.new_zeros((longest * each, *tensor.shape[1:]))
            filled[: tensor.shape[0]] = tensor
            parts = gather(filled).split(longest * each)
            return torch.cat([part[: count * each] for part, count in zip(parts, counts, strict=True)])

        own = ("gather", "gather_for_metrics")
        vars(self.accelerator).update(dict.fromkeys(own, gather_rows))
        try:
            yield
        finally:
            for name in own:
                delattr(self.accelerator, name)
