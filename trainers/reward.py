"""Reward modelling on TRL's RewardTrainer: one score per text, which is higher for the chosen answer.

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
    """Build the trainer for chosen_ids and rejected_ids. Its model is a classifier with one label."""
    from trl import RewardConfig

    from trainers.loop.ingredients import ingredients
    from trainers.loop.trl_trainers import TokenizedRewardTrainer

    config = context.config
    arguments = make_arguments(
        RewardConfig,
        **context.arguments,
        max_length=None,  # prepare has dropped pairs that are too long
        center_rewards_coefficient=config.center_rewards_coefficient,
    )
    return TokenizedRewardTrainer(args=arguments, **ingredients(context))


def main(argv: Sequence[str] | None = None) -> int:
    return run("reward", build, argv)


if __name__ == "__main__":
    sys.exit(main())
