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

    from trainers.model import load_model, lora_config

    config = context.config
    arguments = make_arguments(
        SFTConfig,
        **context.arguments,
        max_length=config.sequence_length,
        packing=config.packed
        != "none",  # the collator then keeps documents apart; the packing itself is done
        packing_strategy="bfd",
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model = load_model(config, context.tokenizer)
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=context.rows("train"),
        eval_dataset=context.rows("valid"),
        processing_class=context.tokenizer,
        peft_config=lora_config(config, context.new_tokens, model),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("sft", build, argv)


if __name__ == "__main__":
    sys.exit(main())
