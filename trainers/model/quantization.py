"""The type that a model computes in, and how bitsandbytes quantises it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.config.schema import TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The type that matrix products run in."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "", torch.float32)


def quantization_config(config: TrainConfig) -> BitsAndBytesConfig:
    """nf4 or int8, as AutoTrain quantises; nf4 is stored in the compute type, so that FSDP can shard it."""
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
    if config.kind.scores:  # the new head is trained, so it stays whole
        settings["llm_int8_skip_modules"] = ["score", "classifier", "lm_head"]
    return BitsAndBytesConfig(**settings)


def keep_layout(model: PreTrainedModel) -> None:
    """Keep the 4-bit weights in the layout that can be trained, saved and dequantised.

    On CPUs with avx512_bf16 bitsandbytes (0.50) packs them anew in the first forward of an evaluation. That
    layout has no backward: training after it goes on with wrong gradients, and a save of ZeRO-3 fails.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
