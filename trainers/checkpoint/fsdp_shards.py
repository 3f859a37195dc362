"""The shards of FSDP in a checkpoint: each rank writes its shards with torch.distributed.checkpoint (DCP).

    checkpoint-N/shards/   {"model": {name: DTensor}, "optimizer": {...}}, by the names of the parameters

The names do not depend on the number of ranks, so any number of ranks can read the shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from trainers.checkpoint.safe_pickle import SafeReader
from trainers.storage.manifest import SHARDS


def make_stager() -> DefaultStager:
    """Return the stager: host memory to which the state is copied before a thread writes it.

    All saves of a run reuse this memory. A copy to new memory takes several times as long.
    """
    return DefaultStager(StagingOptions(False, False, False, False))


def save(
    model: Any, optimizer: Any, folder: Path, group: Any, stager: DefaultStager, trains_all: bool
) -> Future[Any]:
    """Start to write. Returns once the state is copied, so that training can continue and change it."""
    weights, moments = get_state_dict(model, optimizer, options=_options(trains_all))
    weights = _kept(model, weights, trains_all)
    writer = dcp.FileSystemWriter(folder / SHARDS, single_file_per_rank=True, sync_files=True)
    state = {"model": weights, "optimizer": moments}
    started = dcp.async_save(state, storage_writer=writer, process_group=group, async_stager=stager)
    return started if isinstance(started, Future) else started.upload_completion


def finish(writing: Future[Any]) -> None:
    """Wait until all ranks have written their shards.

    Raises:
        ShardError: a rank could not write.
    """
    with _as_errors():
        writing.result()


def load(model: Any, optimizer: Any, folder: Path, trains_all: bool) -> None:
    """Read the weights and the optimiser's state into the model and optimiser of this run.

    Raises:
        ShardError: a rank could not read its shards.
    """
    options = _options(trains_all)
    weights, moments = get_state_dict(model, optimizer, options=options)  # the tensors to read into
    state: dict[str, Any] = {"model": _kept(model, weights, trains_all), "optimizer": moments}
    with _as_errors():
        dcp.load(state, storage_reader=SafeReader(folder / SHARDS))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


def load_weights(model: Any, folder: Path, trains_all: bool) -> None:
    """Read only the weights.

    Raises:
        ShardError: a rank could not read its shards.
    """
    weights = _kept(model, get_model_state_dict(model, options=_options(trains_all)), trains_all)
    with _as_errors():
        dcp.load({"model": weights}, storage_reader=SafeReader(folder / SHARDS))
    set_model_state_dict(model, weights, options=_options(trains_all))


class ShardError(RuntimeError):
    """A rank could not write or read its shards. The cause is the error of the library."""


@contextmanager
def _as_errors() -> Iterator[None]:
    """Turn torch's CheckpointException into ShardError.

    torch raises it on every rank, but it is not a subclass of Exception, so no handler would catch it.
    """
    try:
        yield
    except CheckpointException as error:
        number, (cause, _) = next(iter(error.failures.items()))
        raise ShardError(f"rank {number}: {type(cause).__name__}: {cause}") from cause


def _options(trains_all: bool) -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=not trains_all, strict=trains_all)


def _kept(model: Any, weights: dict[str, Any], trains_all: bool) -> dict[str, Any]:
    """Return the weights of a checkpoint: all, or without the frozen ones.

    torch leaves out a frozen weight under one name only. A tied one has another, such as lm_head.weight.
    """
    if trains_all:
        return weights
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, weight in named if not weight.requires_grad}
    return {name: weight for name, weight in weights.items() if name not in frozen}
