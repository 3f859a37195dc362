"""The arguments of transformers' Trainer."""

from __future__ import annotations

from trainers.config.schema import TrainConfig
from trainers.loop.arguments import logging_steps


def test_logging_steps_follow_autotrain(prepare):
    data = {"train": prepare([{"text": f"row {i}"} for i in range(40)])}
    assert logging_steps(TrainConfig(batch_size=2), data) == 4
    assert logging_steps(TrainConfig(batch_size=64), data) == 1
    assert logging_steps(TrainConfig(logging_steps=7), data) == 7
