"""The dtype that a model computes in, and its quantisation with bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.config.schema import TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the matrix products."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "", torch.float32)


def quantization_config(config: TrainConfig) -> BitsAndBytesConfig:
    """Return the settings of nf4 or int8, as AutoTrain has them.

    nf4 is stored in the compute dtype, so that FSDP can shard it.
    """
    from transformers import BitsAndBytesConfig

    dtype = compute_dtype(config)
    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": dtype,
        "bnb_4bit_use_double_quant": config.double_quantization,
    }
    settings: dict[str, Any] = {"load_in_8bit": True} if config.quantization == "int8" else nf4
    if config.kind.scores:  # the new head is trained, so it is not quantised
        settings["llm_int8_skip_modules"] = ["score", "classifier", "lm_head"]
    return BitsAndBytesConfig(**settings)


def keep_layout(model: PreTrainedModel) -> None:
    """Keep the 4-bit weights in the layout that can be trained, saved and dequantised.

    On CPUs with avx512_bf16, bitsandbytes (0.50) packs them again in the first forward of an evaluation. That
    layout has no backward: training continues with wrong gradients, and a save under ZeRO-3 fails.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
