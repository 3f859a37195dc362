"""Reward modelling on TRL's RewardTrainer: one score for a text, higher for the chosen answer.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.reward config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.loop.arguments import make_arguments
from trainers.loop.context import Context
from trainers.loop.life import run

if TYPE_CHECKING:
    from trainers.loop.trl_trainers import TokenizedRewardTrainer


def build(context: Context) -> TokenizedRewardTrainer:
    """The trainer over chosen_ids and rejected_ids; its model is a classifier with one label."""
    from trl import RewardConfig

    from trainers.loop.ingredients import ingredients
    from trainers.loop.trl_trainers import TokenizedRewardTrainer

    config = context.config
    arguments = make_arguments(
        RewardConfig,
        **context.arguments,
        max_length=None,  # rows that are too long are gone already
        center_rewards_coefficient=config.center_rewards_coefficient,
    )
    return TokenizedRewardTrainer(args=arguments, **ingredients(context))


def main(argv: Sequence[str] | None = None) -> int:
    return run("reward", build, argv)


if __name__ == "__main__":
    sys.exit(main())
