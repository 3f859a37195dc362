"""The dtypes of a quantised model."""

from __future__ import annotations

import pytest
import torch
from inprocess import PEFT, build, settings_of


def test_int4_is_nf4_stored_in_the_compute_type():
    from trainers.model.quantization import quantization_config

    for name, dtype in ((None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config = settings_of(trainer="sft", peft=True, quantization="int4", mixed_precision=name).train
        found = quantization_config(config)
        assert (found.bnb_4bit_quant_type, found.bnb_4bit_compute_dtype) == ("nf4", dtype)
        assert found.bnb_4bit_quant_storage == dtype, "otherwise FSDP cannot shard it"


@pytest.mark.parametrize("quantization", [None, "int4", "int8"])
def test_trained_weights_are_float32(tmp_path, tiny_model, quantization):
    config = {**PEFT, "quantization": quantization}
    model = build(tmp_path, tiny_model, trainer="sft", **config).trainer.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
