"""Check that a saved final model can be opened. Reads only headers; builds and unpickles nothing."""

from __future__ import annotations

import os
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trainers.config.json_text import parse_json

ADAPTER = "adapter_config.json"
# A tokenizer has at least one of these files, depending on its kind, in addition to tokenizer_config.json.
VOCABULARIES = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.spm", "added_tokens.json")


def check_saved(folder: Path, listed: Collection[str] | None = None) -> None:
    """Check that the final model in a folder opens: config, headers of the weight files, tokenizer.

    `listed` are its files. What else is in the folder is not looked at. None: all that is there.

    Raises:
        RuntimeError: a file is missing, truncated or empty; the message names it.
    """
    files = os.listdir(folder) if listed is None else listed
    adapter = ADAPTER in files
    read_object(folder / (ADAPTER if adapter else "config.json"))
    stem = "adapter_model" if adapter else "model"
    index = f"{stem}.safetensors.index.json"
    placed: dict[str, str] = read_object(folder / index).get("weight_map", {}) if index in files else {}
    names = set(placed.values()) or {f"{stem}.safetensors"}
    held = {name: _tensors(folder / name) for name in sorted(names)}
    for tensor, name in placed.items():
        if tensor not in held[name]:
            raise RuntimeError(
                f"the saved model is broken: {folder / name} lacks {tensor}, which the index lists."
            )
    for name in sorted(files):
        if name.endswith(".safetensors") and name not in held:
            _tensors(folder / name)
    read_object(folder / "tokenizer_config.json")
    vocabularies = (name for name in files if any(fnmatch(name, pattern) for pattern in VOCABULARIES))
    if not any((folder / name).is_file() for name in vocabularies):
        raise RuntimeError(f"the saved model is broken: {folder} has no vocabulary for the tokenizer.")
    if "tokenizer.json" in files:
        read_object(folder / "tokenizer.json")


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of a saved model that holds a JSON object.

    Raises:
        RuntimeError: the file is missing or malformed.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RuntimeError(f"the saved model is broken: {path} is missing.") from None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the saved model is broken: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RuntimeError(f"the saved model is broken: {path} does not hold a JSON object.")
    return value


def _tensors(path: Path) -> set[str]:
    """Return the names of the tensors in a weight file. Its header must cover the file to the last byte."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            # A sharded save leaves such a tensor if it saved the empty placeholder of a rank.
            empty = [name for name in sorted(names) if 0 in file.get_slice(name).get_shape()]
    except FileNotFoundError:
        raise RuntimeError(f"the saved model is broken: {path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"the saved model is broken: {path} cannot be opened: {error}") from error
    if not names or empty:
        what = f"{empty[0]} has no values" if empty else "it has no tensors"
        raise RuntimeError(f"the saved model is broken: {path}: {what}.")
    return names
