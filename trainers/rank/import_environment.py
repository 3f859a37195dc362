"""The environment variables that must be the same in a warm process that is kept for several runs.

The launcher (supervise/warm_parent.py) and the process (trainers/warm.py) compare them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Variables that libraries read when they are imported. A different value in a rank would have no effect.
_READ_BY_IMPORTS = re.compile(
    r"(HF|HUGGING_?FACE|TRANSFORMERS|DATASETS|TOKENIZERS|TORCH|PYTORCH|TRL|WANDB|DS|BNB|XDG|PYTHON|LD)_?\w*|HOME"
)


def read_by_imports(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that must have the same value in the ranks as in the process that imported."""
    return {name: value for name, value in environ.items() if _READ_BY_IMPORTS.fullmatch(name)}
