"""Kahneman-Tversky optimisation (arXiv 2402.01306) on TRL's KTOTrainer: wanted and unwanted answers.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.kto config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.loop.arguments import make_arguments
from trainers.loop.context import Context
from trainers.loop.life import run

if TYPE_CHECKING:
    from trainers.loop.trl_trainers import TokenizedKTOTrainer


def build(context: Context) -> TokenizedKTOTrainer:
    """Build the trainer for prompt_ids, completion_ids, KL_completion_ids and label."""
    from trl import KTOConfig

    from trainers.loop.ingredients import build_with_reference
    from trainers.loop.trl_trainers import TokenizedKTOTrainer

    config = context.config
    arguments = make_arguments(
        KTOConfig,
        **context.arguments,
        beta=config.kto_beta,
        loss_type=config.loss_types[0],
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        max_length=None,  # samples are cut already, at the start of the prompt
    )
    return build_with_reference(TokenizedKTOTrainer, arguments, context)


def main(argv: Sequence[str] | None = None) -> int:
    return run("kto", build, argv)


if __name__ == "__main__":
    sys.exit(main())
