"""The folders where huggingface_hub keeps its files on this machine (its constants.py)."""

from __future__ import annotations

import os
from pathlib import Path


def _home() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))


def hub_cache() -> Path:
    """Return the folder of downloaded models and datasets."""
    return Path(os.environ.get("HF_HUB_CACHE", _home() / "hub"))


def token_file() -> Path:
    """Return the file that `hf auth login` writes."""
    return Path(os.environ.get("HF_TOKEN_PATH", _home() / "token"))
