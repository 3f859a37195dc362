"""Shards of a checkpoint, as FSDP writes them on one rank, and code in their pickles."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save


def shard(folder: Path, model: Any, *, only_trained: bool = False) -> Path:
    """Write what FSDP saves on one rank: a model state, and an optimiser state with more than tensors."""
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad} if only_trained else set()
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    save(
        {"model": state, "optimizer": {"step": 3, "lr": [0.1, None], "moment": torch.ones(4)}},
        storage_writer=FileSystemWriter(folder / "shards"),
        no_dist=True,
    )
    return folder


def checkpoint_of(folder: Path, tiny: Path, **config: Any) -> tuple[Path, Any]:
    """Return a checkpoint of a full model, and the model."""
    from transformers import AutoConfig, LlamaForCausalLM

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(1)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(tiny, **config))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "manifest.json").write_text("{}")
    return shard(folder, model), model


class Malice:
    """An object whose pickle runs a command: it creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def plant_code(shards: Path, mark: Path) -> None:
    """Put an object that runs a command into the index of these shards."""
    metadata = FileSystemReader(shards).read_metadata()
    metadata.planner_data = Malice(mark)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
