"""What a run is predicted to need in memory and on the disk; the parameters of a model are counted."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.memory import predict_bytes_per_rank, predict_disk, size_of_model
from trainers.config.schema import TrainConfig


@pytest.mark.parametrize(
    ("values", "checkpoint"),
    [
        ({"save_strategy": "epoch"}, 12_000),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "no", "save_minutes": 30}, 12_000),
        ({"save_strategy": "epoch", "save_minutes": 30}, 12_000),
    ],
    ids=str,
)
def test_a_checkpoint_needs_no_room_only_if_none_is_saved(values: dict[str, Any], checkpoint: int) -> None:
    assert predict_disk(1000, TrainConfig(trainer="sft", **values)) == (checkpoint, 4000)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimizer": "adamw_torch_fused"}, (12_000, 4000)),  # the weight and two moments
        ({"optimizer": "adafactor"}, (4000, 4000)),  # its state is not counted
        ({"peft": True}, (24, 8)),  # only the adapter
    ],
    ids=str,
)
def test_what_is_trained_and_adams_moments_are_saved(
    values: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert predict_disk(1000, TrainConfig(trainer="sft", save_strategy="epoch", **values)) == expected


def test_the_parameters_of_all_files_are_counted(tmp_path: Path) -> None:
    for number, shape in enumerate(([10, 3], [7])):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "w": entry}).encode()
        (tmp_path / f"model-{number}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert size_of_model(str(tmp_path)) == 37


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ({"trainer": "sft"}, 1),
        ({"trainer": "dpo"}, 2),
        ({"trainer": "kto"}, 2),
        ({"trainer": "orpo"}, 1),
        ({"trainer": "dpo", "precompute_ref_log_probs": True}, 1),
        ({"trainer": "dpo", "peft": True, "quantization": None}, 1),  # the base model with its adapter off
        ({"trainer": "dpo", "peft": True, "quantization": None, "model_ref": "other"}, 2),
    ],
)
def test_a_reference_model_counts_as_memory(values: dict[str, Any], weights: int) -> None:
    single = predict_bytes_per_rank(1000, TrainConfig(**values | {"trainer": "sft", "model_ref": None}))
    assert predict_bytes_per_rank(1000, TrainConfig(**values)) - single == (weights - 1) * 4 * 1000
