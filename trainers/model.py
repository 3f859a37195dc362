"""Model, tokenizer, quantisation and LoRA: the only place that builds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.attention import choose_attention
from trainers.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The model's tokenizer with the template, padding side and length that the config names.

    Returns it, and the ids of the tokens that its vocabulary gained.

    Raises:
        ConfigError: there is no tokenizer, or no template where one is asked for.
    """
    from transformers import AutoTokenizer

    from trainers.chat import set_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, token=config.token)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base_model: no tokenizer can be loaded from {config.model}: {_first_line(error)}"
        ) from error
    gained = set_template(tokenizer, config.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.padding is not None:
        tokenizer.padding_side = config.padding
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.model_max_length)
    known = tokenizer.get_vocab()
    return tokenizer, [known[token] for token in gained]


def load_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model on its way to training: dtype, attention, quantisation, and room for every token.

    Weights that are trained are float32 (autocast computes in mixed_precision); frozen ones have the compute
    type. Call it after TrainingArguments exist, so that ZeRO-3 and FSDP can shard while loading.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = compute_dtype(config) if config.peft else torch.float32
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": choose_attention(config)[0],
        "token": config.token,
    }
    if config.quantization is not None:
        kwargs["quantization_config"] = quantization_config(config)
        sharded = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & set(os.environ)
        if torch.cuda.is_available() and not sharded:  # the sharded backends place the weights themselves
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(config.model, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {config.model} cannot be loaded: {_first_line(error)}") from error
    _fit_vocabulary(model, tokenizer)
    return model


def _fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds rows for tokens that the model does not know; before wrapping, since sharding would lose them."""
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer))


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
        "bnb_4bit_use_double_quant": False,
    }
    settings: dict[str, Any] = {"load_in_8bit": True} if config.quantization == "int8" else nf4
    return BitsAndBytesConfig(**settings)


def lora_config(config: TrainConfig, new_tokens: list[int]) -> LoraConfig | None:
    """LoRA's settings, or None for full training. Tokens that the vocabulary gained are trained too."""
    if not config.peft:
        return None
    from peft import LoraConfig

    asked = config.target_modules
    modules = asked if asked in (None, "all-linear") else [name.strip() for name in asked.split(",")]
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=modules,
        trainable_token_indices=new_tokens or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def merge_adapter(config: TrainConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replaces the adapter in `folder` by the whole model, as AutoTrain does.

    In one process, from the saved files.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=compute_dtype(config), token=config.token)
    _fit_vocabulary(base, tokenizer)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    merged.save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
