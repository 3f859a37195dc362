"""Direct preference optimisation (arXiv 2305.18290) on TRL's DPOTrainer.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.dpo config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.loop.arguments import make_arguments
from trainers.loop.context import Context
from trainers.loop.life import run

if TYPE_CHECKING:
    from trainers.loop.trl_trainers import TokenizedDPOTrainer


def build(context: Context) -> TokenizedDPOTrainer:
    """Build the trainer for prompt_ids, chosen_ids and rejected_ids."""
    from trl import DPOConfig

    from trainers.loop.ingredients import build_with_reference
    from trainers.loop.trl_trainers import TokenizedDPOTrainer

    config = context.config
    arguments = make_arguments(
        DPOConfig,
        **context.arguments,
        beta=config.dpo_beta,
        loss_type=config.loss_types,
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        max_length=None,  # samples are cut already, at the start of the prompt
    )
    return build_with_reference(TokenizedDPOTrainer, arguments, context)


def main(argv: Sequence[str] | None = None) -> int:
    return run("dpo", build, argv)


if __name__ == "__main__":
    sys.exit(main())
