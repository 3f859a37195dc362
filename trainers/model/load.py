"""Load the model and its reference: dtype, attention, quantisation, and an embedding for every token."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.model import fsdp
from trainers.model.activation_checkpointing import checkpoint_layers
from trainers.model.attention import choose_attention, implementation
from trainers.model.compilation import compile_layers
from trainers.model.padding_free import flatten_body
from trainers.model.quantization import compute_dtype, keep_layout, quantization_config
from trainers.model.source import model_class, model_config, source_arguments
from trainers.model.tokenizer import tokenizer_of
from trainers.model.trust import why_not_loaded
from trainers.rank.process import rank
from trainers.rank.say import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the model for training: dtype, attention, quantisation, and an embedding for every token.

    Weights that are trained are float32 (autocast computes in mixed_precision). Frozen ones have the compute
    dtype. Call it after TrainingArguments exist, so that ZeRO-3 and FSDP can shard while loading.

    Raises:
        ConfigError: the model cannot be loaded, or does not support what the config asks for.
    """
    model = _load(config.model, config, tokenizer)
    checkpoint_layers(model, config)
    if config.torch_compile:
        compile_layers(model)
    return model


def load_reference(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """Load the frozen reference of dpo and kto. None: the model without its adapter is the reference.

    TRL would load it by name, without the tokens that were added to the vocabulary.

    Raises:
        ConfigError: the reference cannot be loaded, or it has another tokenizer.
    """
    if config.model_ref is None:
        return None if config.peft else _load(config.model, config, tokenizer)
    other = tokenizer_of(config.model_ref, config).get_vocab()
    own = tokenizer_of(config.model, config).get_vocab()
    if other != own:
        differing = sorted(set(own.items()) ^ set(other.items()))[:3]
        raise ConfigError(
            f"model_ref: the tokenizer of {config.model_ref} differs from that of {config.model} "
            f"({len(other)} and {len(own)} tokens; different: "
            f"{', '.join(repr(token) for token, _ in differing)}), so their log-probabilities cannot be "
            "compared. Use a reference of the same family."
        )
    return _load(config.model_ref, config, tokenizer)


def _load(name: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    import torch
    import transformers

    attention = choose_attention(config, model_config(name, config))[0]
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype(config) if config.peft else torch.float32,
        "attn_implementation": implementation(attention),
        **source_arguments(name, config),
    }
    if config.kind.scores:
        kwargs["num_labels"] = 1
    if config.use_kernels:
        _check_kernels()
        kwargs["use_kernels"] = True
    if config.quantization is not None:
        kwargs["quantization_config"] = quantization_config(config)
        sharded = fsdp.requested() or "ACCELERATE_USE_DEEPSPEED" in os.environ
        if torch.cuda.is_available() and not sharded:  # the sharded backends place the weights themselves
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    verbosity = transformers.logging.get_verbosity()
    if config.kind.scores:  # a causal LM has no score; _draw_head reports it
        transformers.logging.set_verbosity_error()
    try:
        model, info = model_class(config).from_pretrained(name, output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {name} cannot be loaded: {why_not_loaded(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if config.quantization == "int4":
        keep_layout(model)
    if config.kind.scores:
        _draw_head(model, info["missing_keys"], config.seed)
    fit_vocabulary(model, tokenizer, config.seed)
    if config.packed != "none":
        flatten_body(model, attention == "documents" and config.kind.pairs)
    if fsdp.requested():
        fsdp.check_buffers(model)
        fsdp.choose_wrapped_modules(model)
    loaded: PreTrainedModel = model
    return loaded


def _check_kernels() -> None:
    """Check that transformers supports the installed version of kernels. The launcher cannot check this.

    Raises:
        ConfigError: it does not.
    """
    from transformers.utils.import_utils import (
        KERNELS_MAX_VERSION,
        KERNELS_MIN_VERSION,
        is_kernels_available,
    )

    if not is_kernels_available():
        needed = f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
        raise ConfigError(
            f"use_kernels: transformers does not support this version of kernels: pip install '{needed}'."
        )


def _draw_head(model: PreTrainedModel, missing: set[str], seed: int) -> None:
    """Initialise a reward head that the checkpoint lacks.

    The values depend only on the seed, so they are the same on every backend and rank.
    """
    import torch

    if missing and rank() == 0:
        say("reward", f"{', '.join(sorted(missing))} is not in the checkpoint; initialised from seed {seed}")
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(missing):
        parameter = model.get_parameter(name)
        with _gathered(parameter):
            if parameter.is_meta or not parameter.numel():  # FSDP sends it from rank 0
                continue
            value = torch.empty(parameter.shape)
            if parameter.dim() > 1:
                value.normal_(0, std, generator=generator)
            else:
                value.fill_(0 if name.endswith("bias") else 1)
            parameter.data.copy_(value)


def _gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """Gather a parameter that ZeRO-3 has sharded, so that it can be written while the block runs."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return context


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Add embeddings for tokens that the model does not know. Call it before wrapping: sharding loses them.

    With one seed they are the same in the policy, the reference and a later merge.
    """
    import torch

    if len(tokenizer) > model.config.get_text_config().vocab_size:
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer))
