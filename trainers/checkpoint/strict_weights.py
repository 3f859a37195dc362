"""Load every weight of a checkpoint, or none.

Checkpoints of one process and of DDP have the files of transformers and peft, with the names that
save_pretrained writes. For some models (mixture of experts, a vision tower) these are not the names in
memory. transformers' Trainer loads them by their names in memory and ignores what does not fit, so these
models would keep a part of their old weights. FSDP and DeepSpeed store the names in memory; check_shards
compares them.
"""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint.shard_reader import open_shards
from trainers.config.errors import ConfigError
from trainers.storage.saved_model import ADAPTER


def load_weights(model: Any, folder: Path, names: Collection[str] | None = None) -> None:
    """Load the weights of `folder` into a model, or into its adapter if it has one.

    `names` are the files that belong to it. None: all that are there.

    Raises:
        ConfigError: a weight is missing, unknown, or has another shape.
    """
    files = os.listdir(folder) if names is None else names
    try:
        if ADAPTER in files:
            _load_adapter(model, folder)
        else:
            _load_model(model, folder, files)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{folder}: {error}") from error


def _load_model(model: Any, folder: Path, files: Collection[str]) -> None:
    """Load all weights by the mapping of names and shapes of the model's own class."""
    stored, expected = set(_stored(folder, files)), set(_names_in_files(model))
    _check(sorted(expected - stored), sorted(stored - expected), type(model).__name__)
    # A second model for a moment. Its weights are as wide as the widest here, so that none is rounded.
    widest = max(
        (p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda kind: kind.itemsize
    )
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]):  # the constructor draws random weights
        other = type(model).from_pretrained(folder, config=config, dtype=widest, local_files_only=True)
    model.load_state_dict(other.state_dict())
    for own, read in zip(model.parameters(), other.parameters(), strict=True):
        if hasattr(own, "ds_tensor"):  # ZeRO-3 has sharded both alike, and the state dict is empty
            own.ds_tensor.data.copy_(read.ds_tensor.data)


def _names_in_files(model: Any) -> Iterable[str]:
    """Return the names of a model's weights as save_pretrained writes them: one for tied weights."""
    from transformers.core_model_loading import revert_weight_conversion

    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    empty = {name: value.to("meta") for name, value in model.state_dict().items() if name not in left_out}
    names: Iterable[str] = revert_weight_conversion(model, empty)
    return names


def _stored(folder: Path, files: Collection[str]) -> Iterable[str]:
    from safetensors import safe_open

    for file in fnmatch.filter(files, "model*.safetensors"):
        with safe_open(folder / file, framework="pt") as weights:
            yield from weights.keys()


def _load_adapter(model: Any, folder: Path) -> None:
    """Load an adapter by peft's mapping of names."""
    [name] = model.active_adapters
    found = model.load_adapter(folder, name, is_trainable=True)
    _check(found.missing_keys, found.unexpected_keys, "the adapter")


def check_shards(model: Any, folder: Path, trains_all: bool) -> None:
    """Check that shards have each weight of a model that is not sharded yet, and no other.

    Without `trains_all`, they have only the weights that are trained. A tied weight has one name or all. One
    rank is enough: all ranks have the same model, and the lists of all shards are read.

    Raises:
        ConfigError: a weight is missing or unknown, or the shards cannot be read.
    """
    source = open_shards(folder)
    if source is None:
        raise ConfigError(f"{folder} has no shards.")
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if trains_all or weight.requires_grad:
            names.setdefault(id(weight), []).append(name)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    missing = [tied[0] for tied in names.values() if not source.stored.keys() & set(tied)]
    known = {name for tied in names.values() for name in tied} | buffers
    try:
        _check(missing, sorted(source.stored.keys() - known), type(model).__name__)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from error


def _check(missing: list[str], unknown: list[str], owner: str) -> None:
    if missing:
        raise ValueError(f"it lacks {missing[0]} of {owner}" + _more(missing))
    if unknown:
        raise ValueError(f"it has {unknown[0]}, which {owner} does not have" + _more(unknown))


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)." if len(names) > 1 else "."
