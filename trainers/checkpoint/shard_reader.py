"""Read the shards of a checkpoint as one model: tensors by name, whose values are read on demand."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint.safe_pickle import SafeReader, allow_deepspeed
from trainers.config.errors import ConfigError
from trainers.config.text import count_of, first_line
from trainers.storage.manifest import SHARDS

LATEST = "latest"  # DeepSpeed's pointer to the folder of its newest save
Tensors = dict[str, torch.Tensor]


@dataclass
class Source:
    """The tensors of a checkpoint: their names and shapes (on `meta`), and a function that reads values."""

    stored: Tensors
    fill: Callable[[Tensors], None]  # copies the stored values into tensors, by name; casts to their types


def open_shards(checkpoint: Path) -> Source | None:
    """Open the shards of a checkpoint. Returns None if its weights are ordinary files.

    Raises:
        ConfigError: a shard is missing or truncated, or contains a class that no checkpoint has.
    """
    try:
        if (checkpoint / SHARDS).is_dir():
            return _fsdp(checkpoint / SHARDS)
        if (checkpoint / LATEST).is_file():
            return _zero(checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8").strip())
    except (
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:  # torch: RuntimeError
        raise ConfigError(f"{checkpoint} cannot be read: {first_line(error)}") from error
    return None


def _fsdp(folder: Path) -> Source:
    """Open DCP's shards. The parts of all ranks are read into one tensor, and cast while they are copied."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = SafeReader(folder).read_metadata()
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < end:
            raise ConfigError(f"{folder / name} is missing or truncated: the index needs {end} bytes of it.")

    def fill(wanted: Tensors) -> None:
        keyed: dict[str, Any] = {f"model.{name}": tensor for name, tensor in wanted.items()}
        try:
            load(keyed, storage_reader=SafeReader(folder), no_dist=True)
        except CheckpointException as error:  # torch derives it from BaseException, not from Exception
            failure = next(iter(error.failures.values()))[0]
            raise ConfigError(f"{folder} cannot be read: {first_line(failure)}") from error

    stored = {
        key.removeprefix("model."): torch.empty(value.size, dtype=value.properties.dtype, device="meta")
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    return Source(stored, fill)


def _zero(folder: Path) -> Source:
    """Open DeepSpeed's float32 weights, whose parts are in the optimiser files of the ranks.

    DeepSpeed's zero_to_fp32 joins all parts of ZeRO 1 and 2 in memory. Here the files are memory-mapped, and
    a weight is copied out of them on demand.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for a GPU, and warns if there is none
    allow_deepspeed()
    from deepspeed.checkpoint import constants as key

    states = _mapped(folder, "model")
    ranks = [state[key.OPTIMIZER_STATE_DICT] for state in _mapped(folder, "optim")]
    count = ranks[0][key.PARTITION_COUNT]
    if (expected := max(count) if isinstance(count, list) else count) != len(ranks):
        raise ConfigError(
            f"{folder} has the optimiser files of {count_of(len(ranks), 'rank')}, but it was written by "
            f"{count_of(expected, 'rank')}."
        )
    parts = dict(
        _zero3_parts(ranks, states[0]) if key.FP32_FLAT_GROUPS in ranks[0] else _zero2_parts(ranks, states[0])
    )
    shapes = {name: shape for group in states[0][key.PARAM_SHAPES] for name, shape in group.items()}
    for name, shape in (states[0].get(key.FROZEN_PARAM_SHAPES) or {}).items():  # in no optimiser file
        pieces = [state[key.FROZEN_PARAM_FRAGMENTS][name].flatten() for state in states]
        parts[name], shapes[name] = pieces, shape
    for name in states[0][key.BUFFER_NAMES]:
        parts[name], shapes[name] = [states[0]["module"][name].flatten()], states[0]["module"][name].shape
    for alias, name in states[0]["shared_params"].items():
        if name in parts:
            parts[alias], shapes[alias] = parts[name], shapes[name]

    def fill(wanted: Tensors) -> None:
        for name, tensor in wanted.items():
            flat, at = tensor.view(-1), 0
            for part in parts[name]:
                taken = part[: flat.numel() - at]  # the last part is padded
                flat[at : at + taken.numel()].copy_(taken)
                at += taken.numel()

    return Source({n: torch.empty(shapes[n], dtype=parts[n][0].dtype, device="meta") for n in parts}, fill)


def _mapped(folder: Path, kind: str) -> list[Any]:
    """Open the files of one kind (model, optim) in the order of the ranks, without reading the tensors."""
    files = {path: re.findall(r"rank_(\d+)", path.name) for path in folder.glob(f"*_{kind}_states.pt")}
    if not files:
        raise ConfigError(f"{folder} has no file *_{kind}_states.pt.")
    ordered = sorted(files, key=lambda path: [int(number) for number in files[path]])
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in ordered]


def _cut(flats: Sequence[torch.Tensor], start: int, length: int) -> Iterator[torch.Tensor]:
    """Yield views of `length` values from `start` on, in the concatenation of the flat tensors."""
    for flat in flats:
        size = flat.numel()
        if start < size and length > 0:
            part = flat.detach()[start : start + length]
            length -= part.numel()
            yield part
        start = max(start - size, 0)
    if length > 0:
        raise ConfigError("DeepSpeed's checkpoint has fewer values than its list of weights requires.")


def _zero2_parts(ranks: list[Any], state: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each weight of ZeRO 1 and 2 with its parts: each rank has a range of a flat tensor per group."""
    from deepspeed.checkpoint import constants as key

    paddings = ranks[0].get(key.PARAM_ALIGNMENT_PADDINGS)
    for group, shapes in enumerate(state[key.PARAM_SHAPES]):
        flats, at = [rank[key.SINGLE_PARTITION_OF_FP32_GROUPS][group] for rank in ranks], 0
        for number, (name, shape) in enumerate(shapes.items()):
            yield name, list(_cut(flats, at, math.prod(shape)))
            at += math.prod(shape) + (paddings[group][number] if paddings else 0)


def _zero3_parts(ranks: list[Any], state: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each weight of ZeRO 3 with its parts: one of equal size per rank, at the same offset in each."""
    from deepspeed.checkpoint import constants as key

    at = 0
    for shapes in state[key.PARAM_SHAPES]:
        for name, shape in shapes.items():
            size = math.ceil(math.prod(shape) / len(ranks))
            yield name, [part for rank in ranks for part in _cut(rank[key.FP32_FLAT_GROUPS], at, size)]
            at += size
