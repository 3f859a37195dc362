"""The input from which a trainer module builds its Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.schema import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from trainers.checkpoint.saving import Durable
    from trainers.data.loading import Part
    from trainers.data.prepare import Prepared


@dataclass
class Context:
    """All that a trainer module needs to build its Trainer."""

    config: TrainConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    new_tokens: list[int]
    data: dict[Part, Prepared]  # train, and valid and test if the config has them
    arguments: dict[str, Any]  # for TrainingArguments and its subclasses

    def rows(self, part: Part) -> Dataset | None:
        """Return the samples of a part, or None if the run does not use it."""
        return self.data[part].dataset if part in self.data else None


Build = Callable[[Context], "Durable"]
