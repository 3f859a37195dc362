"""Supervised fine-tuning on TRL's SFTTrainer.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.sft config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.loop.arguments import make_arguments
from trainers.loop.context import Context
from trainers.loop.life import run

if TYPE_CHECKING:
    from trainers.loop.trl_trainers import TokenizedSFTTrainer


def build(context: Context) -> TokenizedSFTTrainer:
    """Build the trainer for samples with input_ids and labels."""
    from trl import SFTConfig

    from trainers.data.collators import FlatCollator
    from trainers.loop.ingredients import ingredients
    from trainers.loop.trl_trainers import TokenizedSFTTrainer

    config = context.config
    arguments = make_arguments(
        SFTConfig,
        **context.arguments,
        max_length=config.sequence_length,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    collator = None if config.packed == "none" else FlatCollator()  # None: TRL pads
    return TokenizedSFTTrainer(args=arguments, data_collator=collator, **ingredients(context))


def main(argv: Sequence[str] | None = None) -> int:
    return run("sft", build, argv)


if __name__ == "__main__":
    sys.exit(main())
