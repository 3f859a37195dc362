"""Odds-ratio preference optimisation (arXiv 2403.07691) on TRL's ORPOTrainer, without a reference model.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.orpo config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.loop.arguments import make_arguments
from trainers.loop.context import Context
from trainers.loop.life import run

if TYPE_CHECKING:
    from trainers.loop.orpo_trainer import TokenizedORPOTrainer


def build(context: Context) -> TokenizedORPOTrainer:
    """Build the trainer for prompt_ids, chosen_ids and rejected_ids."""
    from trl.experimental.orpo import ORPOConfig

    from trainers.loop.ingredients import ingredients
    from trainers.loop.orpo_trainer import TokenizedORPOTrainer

    config = context.config
    arguments = make_arguments(
        ORPOConfig,
        **context.arguments,
        beta=config.orpo_beta,
        max_length=config.sequence_length,
        remove_unused_columns=False,
    )
    return TokenizedORPOTrainer(args=arguments, train_on_prompt=config.trains_on_all, **ingredients(context))


def main(argv: Sequence[str] | None = None) -> int:
    return run("orpo", build, argv)


if __name__ == "__main__":
    sys.exit(main())
