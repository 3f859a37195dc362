"""The prediction of the memory of a rank."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.plan.memory import predict_bytes_per_rank
from trainers.config.schema import TrainConfig


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
