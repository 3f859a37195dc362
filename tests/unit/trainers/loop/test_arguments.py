"""The arguments of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.loop.arguments import logging_steps, training_arguments


def test_logging_steps_follow_autotrain(prepare):
    data = {"train": prepare([{"text": f"row {i}"} for i in range(40)])}
    assert logging_steps(TrainConfig(batch_size=2), data) == 4
    assert logging_steps(TrainConfig(batch_size=64), data) == 1
    assert logging_steps(TrainConfig(logging_steps=7), data) == 7


@pytest.mark.parametrize(("field", "known"), [("optimizer", "adamw_torch"), ("scheduler", "cosine")])
def test_a_name_that_transformers_does_not_know_is_refused_with_those_that_it_knows(field, known):
    with pytest.raises(ConfigError, match=rf"^{field}: 'foo' does not exist\. Allowed: .*\b{known}\b.*\.$"):
        training_arguments(TrainConfig(**{field: "foo"}), Path("run"), 1)
