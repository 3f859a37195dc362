"""The folders where huggingface_hub keeps its files on this machine, found as its constants.py finds them."""

from __future__ import annotations

import os
from pathlib import Path


def _path(variable: str, default: str) -> Path:
    """Return the path in a variable of the environment, with ~ and $NAME replaced."""
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get(variable, default))))


def _home() -> Path:
    return _path("HF_HOME", f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface")


def hub_cache() -> Path:
    """Return the folder of downloaded models and datasets."""
    return _path("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", f"{_home()}/hub"))


def token_file() -> Path:
    """Return the file that `hf auth login` writes."""
    return _path("HF_TOKEN_PATH", f"{_home()}/token")
