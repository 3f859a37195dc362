"""Check that a saved final model can be opened. Reads only headers; builds and unpickles nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"
# A tokenizer has at least one of these files, depending on its kind, in addition to tokenizer_config.json.
VOCABULARIES = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.spm", "added_tokens.json")


def check_saved(folder: Path) -> None:
    """Check that the final model in a folder opens: config, headers of the weight files, tokenizer.

    Raises:
        RuntimeError: a file is missing, truncated or empty; the message names it.
    """
    adapter = (folder / ADAPTER).is_file()
    read_object(folder / (ADAPTER if adapter else "config.json"))
    stem = "adapter_model" if adapter else "model"
    index = folder / f"{stem}.safetensors.index.json"
    placed: dict[str, str] = read_object(index).get("weight_map", {}) if index.is_file() else {}
    names = set(placed.values()) or {f"{stem}.safetensors"}
    held = {name: _tensors(folder / name) for name in sorted(names)}
    for tensor, name in placed.items():
        if tensor not in held[name]:
            raise RuntimeError(
                f"the saved model is broken: {folder / name} lacks {tensor}, which the index lists."
            )
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in held:
            _tensors(path)
    read_object(folder / "tokenizer_config.json")
    if not any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern)):
        raise RuntimeError(f"the saved model is broken: {folder} has no vocabulary for the tokenizer.")
    if (folder / "tokenizer.json").is_file():
        read_object(folder / "tokenizer.json")


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of a saved model that holds a JSON object.

    Raises:
        RuntimeError: the file is missing or malformed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
