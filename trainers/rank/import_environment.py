"""A process that has imported the libraries and is kept for several runs: what both ends must know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What a library reads when it is imported; a rank's own value would come too late.
_READ_BY_IMPORTS = re.compile(
    r"(HF|HUGGING_?FACE|TRANSFORMERS|DATASETS|TOKENIZERS|TORCH|PYTORCH|TRL|WANDB|DS|BNB|XDG|PYTHON|LD)_?\w*|HOME"
)


def read_by_imports(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment must be the same for the ranks as for the process that imported."""
    return {name: value for name, value in environ.items() if _READ_BY_IMPORTS.fullmatch(name)}
