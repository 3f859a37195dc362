"""Which attention a run uses: one decision, with its reason."""

from __future__ import annotations

from trainers.config import TrainConfig


def choose_attention(config: TrainConfig) -> tuple[str, str]:
    """The name that transformers knows the implementation by, and why it was chosen."""
    if config.use_flash_attention_2:
        return "flash_attention_2", "use_flash_attention_2"
    return "sdpa", "torch's own, on every device"
