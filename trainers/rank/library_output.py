"""What the libraries may print in a rank: warnings, and only those of rank 0 that the user can act on."""

from __future__ import annotations

import logging
import os
import warnings

from trainers.rank.process import rank

# Warnings that a user could take for a mistake: logger -> text.
HIDDEN = {
    # In each rank on a CPU if DeepSpeed is installed, with any backend.
    "DeepSpeed": "Setting accelerator to CPU",
    # The Trainer accumulates by itself, so accelerate is told 1. DeepSpeed's config has the user's number.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # On some CPUs, if peft imports it. The kernel is never fetched (model/trust.py), and it works without.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # At a resume with another batch_size. The run itself checks what a resume changes (config/on_resume.py).
    "transformers.trainer_utils": "The following arguments do not match the ones in the `trainer_state.json`",
}


class _Without(logging.Filter):
    """Drop the records whose message contains a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in str(record.msg)


def quieten_libraries() -> None:
    """Let the libraries log only warnings, and only on rank 0, without progress bars."""
    import datasets
    import transformers

    # Deprecation warnings inside the libraries are for their authors. A user cannot fix them.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|accelerate)\b"
    )
    for name, text in HIDDEN.items():
        logging.getLogger(name).addFilter(_Without(text))
    os.environ |= {"TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if rank() != 0:
        transformers.logging.set_verbosity_error()
