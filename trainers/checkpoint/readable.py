"""Whether a file of a checkpoint can be read: it may have been damaged, or replaced, before it was hashed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from trainers.checkpoint.safe_pickle import SafeReader
from trainers.config.json_text import parse_json
from trainers.config.text import first_line


def why_unreadable(path: Path) -> str | None:
    """Return why a file cannot be read, in one line, or None.

    A pickle is loaded as the run will load it, without running code. Tensors are mapped, not read.
    """
    check = _CHECKS.get(path.name) or _CHECKS.get(path.suffix)
    if check is None:
        return None
    try:
        check(path)
    except Exception as error:  # of any class: the file may contain anything
        return f"cannot be read: {type(error).__name__}: {first_line(error)}"
    return None


def _tensors(path: Path) -> None:
    from transformers.trainer_pt_utils import safe_globals  # numpy's random state

    with safe_globals():
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _index(path: Path) -> None:
    SafeReader(path.parent).read_metadata()


def _object(path: Path) -> None:
    if not isinstance(parse_json(path.read_text(encoding="utf-8")), dict):
        raise ValueError("it holds no JSON object")


def _header(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        weights.keys()


_CHECKS: dict[str, Callable[[Path], None]] = {  # by name or suffix
    ".pt": _tensors,
    ".pth": _tensors,
    ".metadata": _index,
    "trainer_state.json": _object,
    ".safetensors": _header,
}
