"""The folders where huggingface_hub keeps its files on this machine, found as its constants.py finds them."""

from __future__ import annotations

import os
from pathlib import Path


def _path(variable: str, default: str) -> Path:
    """Return the path in a variable of the environment, with ~ and $NAME replaced."""
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get(variable, default))))


def hub_home() -> Path:
    """Return the folder of all that the libraries of Hugging Face keep."""
    return _path("HF_HOME", f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface")


def hub_cache() -> Path:
    """Return the folder of downloaded models and datasets."""
    return _path("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", f"{hub_home()}/hub"))


def datasets_cache() -> Path:
    """Return the folder of prepared datasets."""
    return _path("HF_DATASETS_CACHE", f"{hub_home()}/datasets")


def token_file() -> Path:
    """Return the file that `hf auth login` writes."""
    return _path("HF_TOKEN_PATH", f"{hub_home()}/token")
