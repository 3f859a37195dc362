"""Supervised fine-tuning on TRL's SFTTrainer.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.sft config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.run import Context, make_arguments, run

if TYPE_CHECKING:
    from trl import SFTTrainer


def build(context: Context) -> SFTTrainer:
    """The trainer over rows that are tokenized, masked and packed already."""
    from trl import SFTConfig, SFTTrainer

    from trainers.building import ingredients

    config = context.config
    arguments = make_arguments(
        SFTConfig,
        **context.arguments,
        max_length=config.sequence_length,
        # The packing itself is done; this tells the collator to keep documents apart.
        packing=config.packed != "none",
        packing_strategy="bfd",
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(args=arguments, **ingredients(context))


def main(argv: Sequence[str] | None = None) -> int:
    return run("sft", build, argv)


if __name__ == "__main__":
    sys.exit(main())
