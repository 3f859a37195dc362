"""A checkpoint's shards as one model: its tensors by name, whose values are read when they are asked for."""

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
from trainers.config.errors import ConfigError, first_line
from trainers.storage.manifest import SHARDS

LATEST = "latest"  # DeepSpeed's pointer to the folder of its newest save
Tensors = dict[str, torch.Tensor]


@dataclass
class Source:
    """What a checkpoint stores: a tensor without values (on `meta`) by name, and how values are read."""

    stored: Tensors
    fill: Callable[[Tensors], None]  # writes the stored values into tensors of that name, in their own type


def open_shards(checkpoint: Path) -> Source | None:
    """The shards of a checkpoint; None where its weights are ordinary files already.

    Raises:
        ConfigError: some are missing or cut short, or hold what no checkpoint holds.
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
    """DCP's shards: the pieces of all ranks are read into one tensor, and cast as they are copied."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = SafeReader(folder).read_metadata()
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < end:
            raise ConfigError(f"{folder / name} is missing or cut short: {end} bytes of it are indexed.")

    def fill(wanted: Tensors) -> None:
        keyed: dict[str, Any] = {f"model.{name}": tensor for name, tensor in wanted.items()}
        try:
            load(keyed, storage_reader=SafeReader(folder), no_dist=True)
        except CheckpointException as error:  # no Exception: torch derives it from BaseException
            failure = next(iter(error.failures.values()))[0]
            raise ConfigError(f"{folder} cannot be read: {first_line(failure)}") from error

    stored = {
        key.removeprefix("model."): torch.empty(value.size, dtype=value.properties.dtype, device="meta")
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    return Source(stored, fill)


def _zero(folder: Path) -> Source:
    """DeepSpeed's float32 weights, which lie in pieces in the ranks' optimiser files.

    Its own zero_to_fp32 joins all pieces of ZeRO 1 and 2 in memory; here the files are mapped, and a weight
    is copied out of them when it is asked for.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for a GPU, and complains where there is none
    allow_deepspeed()
    from deepspeed.checkpoint import constants as key

    states = _mapped(folder, "model")
    ranks = [state[key.OPTIMIZER_STATE_DICT] for state in _mapped(folder, "optim")]
    count = ranks[0][key.PARTITION_COUNT]
    if (expected := max(count) if isinstance(count, list) else count) != len(ranks):
        raise ConfigError(
            f"{folder} has the optimiser's files of {len(ranks)} ranks, and {expected} wrote it."
        )
    pieces = dict(
        _zero3_pieces(ranks, states[0])
        if key.FP32_FLAT_GROUPS in ranks[0]
        else _zero2_pieces(ranks, states[0])
    )
    shapes = {name: shape for group in states[0][key.PARAM_SHAPES] for name, shape in group.items()}
    for name in states[0][key.BUFFER_NAMES]:
        pieces[name], shapes[name] = [states[0]["module"][name].flatten()], states[0]["module"][name].shape
    for alias, name in states[0]["shared_params"].items():
        if name in pieces:
            pieces[alias], shapes[alias] = pieces[name], shapes[name]

    def fill(wanted: Tensors) -> None:
        for name, tensor in wanted.items():
            flat, at = tensor.view(-1), 0
            for piece in pieces[name]:
                taken = piece[: flat.numel() - at]  # the last one is padded
                flat[at : at + taken.numel()].copy_(taken)
                at += taken.numel()

    return Source({n: torch.empty(shapes[n], dtype=pieces[n][0].dtype, device="meta") for n in pieces}, fill)


def _mapped(folder: Path, kind: str) -> list[Any]:
    """What DeepSpeed wrote of a kind, a rank after another, without reading the tensors yet."""
    files = {path: re.findall(r"rank_(\d+)", path.name) for path in folder.glob(f"*_{kind}_states.pt")}
    if not files:
        raise ConfigError(f"{folder} has no *_{kind}_states.pt.")
    ordered = sorted(files, key=lambda path: [int(number) for number in files[path]])
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in ordered]


def _cut(flats: Sequence[torch.Tensor], start: int, length: int) -> Iterator[torch.Tensor]:
    """Views of `length` values from `start` on, where the flat tensors lie end to end."""
    for flat in flats:
        size = flat.numel()
        if start < size and length > 0:
            piece = flat.detach()[start : start + length]
            length -= piece.numel()
            yield piece
        start = max(start - size, 0)
    if length > 0:
        raise ConfigError("DeepSpeed's checkpoint holds fewer values than its list of weights names.")


def _zero2_pieces(ranks: list[Any], state: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """ZeRO 1 and 2: of each group the weights lie end to end, and the ranks hold a stretch each."""
    from deepspeed.checkpoint import constants as key

    paddings = ranks[0].get(key.PARAM_ALIGNMENT_PADDINGS)
    for group, shapes in enumerate(state[key.PARAM_SHAPES]):
        flats, at = [rank[key.SINGLE_PARTITION_OF_FP32_GROUPS][group] for rank in ranks], 0
        for number, (name, shape) in enumerate(shapes.items()):
            yield name, list(_cut(flats, at, math.prod(shape)))
            at += math.prod(shape) + (paddings[group][number] if paddings else 0)


def _zero3_pieces(ranks: list[Any], state: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """ZeRO 3: of each weight every rank holds an equal part, at the same place of its own values."""
    from deepspeed.checkpoint import constants as key

    at = 0
    for shapes in state[key.PARAM_SHAPES]:
        for name, shape in shapes.items():
            part = math.ceil(math.prod(shape) / len(ranks))
            yield name, [piece for rank in ranks for piece in _cut(rank[key.FP32_FLAT_GROUPS], at, part)]
            at += part
