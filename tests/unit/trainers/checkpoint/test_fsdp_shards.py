"""What the shards of FSDP have: only what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from architectures import SIZES
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.checkpoint import fsdp_shards
from trainers.checkpoint.shard_reader import open_shards
from trainers.checkpoint.strict_weights import check_shards


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A process group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def build() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def test_a_frozen_weight_with_two_names_is_not_in_the_shards(group: Any, tmp_path: Path) -> None:
    """torch leaves out a frozen weight under one of its names. A resume would refuse the other."""
    model = build()
    fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    saving = fsdp_shards.save(model, optimizer, tmp_path, group, fsdp_shards.make_stager(), trains_all=False)
    fsdp_shards.finish(saving)
    source = open_shards(tmp_path)
    assert source is not None and source.stored
    assert not [name for name in source.stored if "lora" not in name]
    check_shards(build(), tmp_path, trains_all=False)
    fsdp_shards.load(model, optimizer, tmp_path, trains_all=False)
    fsdp_shards.load_weights(model, tmp_path, trains_all=False)
