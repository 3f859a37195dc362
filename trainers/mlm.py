"""Masked language modelling (BERT, arXiv 1810.04805) on transformers' Trainer; TRL has no trainer for it.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.mlm config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.loop.arguments import make_arguments
from trainers.loop.context import Context
from trainers.loop.life import run

if TYPE_CHECKING:
    from trainers.loop.masked_trainer import MaskedTrainer


def build(context: Context) -> MaskedTrainer:
    """Build the trainer for input_ids. The collator chooses the masked tokens."""
    from transformers import TrainingArguments

    from trainers.data.mlm_masking import MaskTokens
    from trainers.loop.ingredients import ingredients
    from trainers.loop.masked_trainer import MaskedTrainer, masked_token_loss

    config = context.config
    arguments = make_arguments(
        TrainingArguments,
        **context.arguments,
        remove_unused_columns=False,  # the collator reads `number`
        include_num_input_tokens_seen="non_padding",
    )
    parts = ingredients(context)
    if (adapter := parts.pop("peft_config")) is not None:
        from peft import get_peft_model

        parts["model"].enable_input_require_grads()
        parts["model"] = get_peft_model(parts["model"], adapter)
    collator = MaskTokens(context.tokenizer, config.mlm_probability, config.seed)
    return MaskedTrainer(
        args=arguments,
        data_collator=collator,
        compute_loss_func=masked_token_loss,
        callbacks=[collator],
        **parts,
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("mlm", build, argv)


if __name__ == "__main__":
    sys.exit(main())
