"""Model, tokenizer, quantisation and LoRA: the only place that builds them."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.schema import PAIR_TRAINERS, REFERENCE_TRAINERS, TrainConfig
from trainers.data.chat import forget_truncation
from trainers.data.templates import set_template
from trainers.model import fsdp
from trainers.model.activation_checkpointing import checkpoint_layers
from trainers.model.attention import choose_attention, implementation
from trainers.model.compilation import compile_layers
from trainers.model.padding_free import flatten_body
from trainers.rank.process import rank

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Tokens that vocabularies hold for padding, best first.
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
TASK_TYPES = {"reward": "SEQ_CLS", "mlm": None}  # peft's word for a trainer; CAUSAL_LM for the rest


def load_tokenizer(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The model's tokenizer with the template, padding side and length that the config names.

    Returns it, and the ids of the tokens that its vocabulary gained.

    Raises:
        ConfigError: there is no tokenizer, or no template or mask token where one is needed.
    """
    tokenizer = _tokenizer_of(config.model, config)
    forget_truncation(tokenizer)
    gained = set_template(tokenizer, config.chat_template)
    if config.trainer == "mlm" and tokenizer.mask_token is None:
        raise ConfigError(
            f"base_model: {config.model} has no mask token, so it is no masked LM. Use another model, or "
            "trainer: default."
        )
    _choose_pad(tokenizer)
    if config.padding is not None:
        tokenizer.padding_side = config.padding
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.model_max_length)
    known = tokenizer.get_vocab()
    return tokenizer, [known[token] for token in gained]


def _tokenizer_of(model: str, config: TrainConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **_source(model, config))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base_model: no tokenizer can be loaded from {model}: {_first_line(error)}"
        ) from error
    return tokenizer


def _source(model: str, config: TrainConfig) -> dict[str, Any]:
    """How a model is asked for: revision and remote code are said of base_model alone."""
    own = model == config.model
    return {
        "token": config.token,
        "revision": config.revision if own and config.revision else "main",
        "trust_remote_code": config.trust_remote_code and own,
    }


def _choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """A padding token that is not EOS: whoever masks by padding would never learn to stop.

    A reward model reads the last token that is no padding, which would be the one before EOS.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    known = tokenizer.get_vocab()
    spare = [token for token in PAD_TOKENS if token in known and token != tokenizer.eos_token]
    if tokenizer.unk_token and tokenizer.unk_token != tokenizer.eos_token:
        spare.append(tokenizer.unk_token)
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token


def load_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model on its way to training: dtype, attention, quantisation, and room for every token.

    Weights that are trained are float32 (autocast computes in mixed_precision); frozen ones have the compute
    type. Call it after TrainingArguments exist, so that ZeRO-3 and FSDP can shard while loading.

    Raises:
        ConfigError: it cannot be loaded, or not be checkpointed as the config asks.
    """
    model = _load(config.model, config, tokenizer)
    checkpoint_layers(model, config)
    if config.torch_compile:
        compile_layers(model)
    return model


def load_reference(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The frozen reference of dpo and kto, or None where the model with its adapter off is the reference.

    TRL would load it by name, without the tokens that the vocabulary gained.

    Raises:
        ConfigError: it cannot be loaded, or it has another tokenizer.
    """
    if config.model_ref is None:
        return None if config.peft else _load(config.model, config, tokenizer)
    other = _tokenizer_of(config.model_ref, config).get_vocab()
    own = _tokenizer_of(config.model, config).get_vocab()
    if other != own:
        differing = sorted(set(own.items()) ^ set(other.items()))[:3]
        raise ConfigError(
            f"model_ref: the tokenizer of {config.model_ref} is not that of {config.model} ({len(other)} and "
            f"{len(own)} tokens; different: {', '.join(repr(token) for token, _ in differing)}), so its "
            "log-probabilities would be of other tokens. Use a reference of the same family."
        )
    return _load(config.model_ref, config, tokenizer)


def model_class(config: TrainConfig) -> Any:
    """The auto class of transformers that a trainer's model is loaded with."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    classes = {"reward": AutoModelForSequenceClassification, "mlm": AutoModelForMaskedLM}
    return classes.get(config.trainer, AutoModelForCausalLM)


def model_config(name: str, config: TrainConfig) -> PreTrainedConfig:
    """The shape of a model, without its weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(name, **_source(name, config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {name} cannot be loaded: {_first_line(error)}") from error
    return loaded


def _load(name: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    import torch
    import transformers

    attention = choose_attention(config, model_config(name, config))[0]
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype(config) if config.peft else torch.float32,
        "attn_implementation": implementation(attention),
        **_source(name, config),
    }
    if config.trainer == "reward":
        kwargs["num_labels"] = 1
    if config.use_kernels:
        _check_kernels()
        kwargs["use_kernels"] = True
    if config.quantization is not None:
        kwargs["quantization_config"] = quantization_config(config)
        sharded = fsdp.asked_for() or "ACCELERATE_USE_DEEPSPEED" in os.environ
        if torch.cuda.is_available() and not sharded:  # the sharded backends place the weights themselves
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    verbosity = transformers.logging.get_verbosity()
    if config.trainer == "reward":  # that a causal LM has no score is expected, and said by _draw_head
        transformers.logging.set_verbosity_error()
    try:
        model, info = model_class(config).from_pretrained(name, output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {name} cannot be loaded: {_first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if config.trainer == "reward":
        _draw_head(model, info["missing_keys"], config.seed)
    fit_vocabulary(model, tokenizer, config.seed)
    if config.packed != "none":
        flatten_body(model, attention == "documents" and config.trainer in PAIR_TRAINERS)
    if fsdp.asked_for():
        fsdp.keep_tied_together(model)
    return model  # type: ignore[no-any-return]


def _check_kernels() -> None:
    """What the launcher cannot see: the versions of kernels that this transformers knows.

    Raises:
        ConfigError: kernels is missing or of another version, or there is no GPU.
    """
    import torch
    from transformers.utils.import_utils import (
        KERNELS_MAX_VERSION,
        KERNELS_MIN_VERSION,
        is_kernels_available,
    )

    if not torch.cuda.is_available():
        raise ConfigError("use_kernels: the hub's kernels are for GPUs, and there is none. Use false.")
    if not is_kernels_available():
        needed = f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
        raise ConfigError(f"use_kernels: the package kernels is needed: pip install '{needed}'.")


def _draw_head(model: PreTrainedModel, missing: set[str], seed: int) -> None:
    """A reward head that the checkpoint lacks, drawn from the seed alone: alike on every backend and rank."""
    import torch

    if missing and rank() == 0:
        print(f"reward: {', '.join(sorted(missing))} is not in the checkpoint; drawn from seed {seed}")
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(missing):
        parameter = model.get_parameter(name)
        with _whole(parameter):
            if parameter.is_meta or not parameter.numel():  # FSDP sends it from rank 0
                continue
            value = torch.empty(parameter.shape)
            if parameter.dim() > 1:
                value.normal_(0, std, generator=generator)
            else:
                value.fill_(0 if name.endswith("bias") else 1)
            parameter.data.copy_(value)


def _whole(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """A parameter that ZeRO-3 has split, put together to be written."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
    return context


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Adds rows for tokens that the model does not know; before wrapping, since sharding would lose them.

    The seed makes them the same in the policy, the reference and a later merge.
    """
    import torch

    if len(tokenizer) > model.config.get_text_config().vocab_size:
        torch.manual_seed(seed)
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
        "bnb_4bit_use_double_quant": config.double_quantization,
    }
    settings: dict[str, Any] = {"load_in_8bit": True} if config.quantization == "int8" else nf4
    if config.trainer == "reward":  # the new head is trained, so it stays whole
        settings["llm_int8_skip_modules"] = ["score", "classifier", "lm_head"]
    return BitsAndBytesConfig(**settings)


def lora_config(config: TrainConfig, new_tokens: list[int], model: PreTrainedModel) -> LoraConfig | None:
    """LoRA's settings, or None for full training. Tokens that the vocabulary gained are trained too.

    Raises:
        ConfigError: peft cannot train those tokens here.
    """
    if not config.peft:
        return None
    from peft import LoraConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if new_tokens and is_deepspeed_zero3_enabled():
        raise ConfigError(
            f"chat_template: {config.chat_template} adds tokens, and their rows in a split model cannot be "
            "trained beside an adapter under ZeRO-3. Use distributed_backend: fsdp, launch.zero_stage: 2, or "
            "chat_template: tokenizer."
        )
    _check_targets(model, config)
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=config.lora_targets,
        trainable_token_indices=_trained_rows(model, new_tokens) if new_tokens else None,
        bias="none",
        task_type=TASK_TYPES.get(config.trainer, "CAUSAL_LM"),
        revision=config.revision,
    )


def _check_targets(model: PreTrainedModel, config: TrainConfig) -> None:
    """target_modules must be there; and dpo and kto read the output's weight past an adapter on it.

    Raises:
        ConfigError: a name or an expression that matches nothing, or the output of dpo and kto.
    """
    targets = config.lora_targets
    if targets is None or targets == "all-linear":
        return
    names = {id(module): path for path, module in model.named_modules() if path}
    asked = targets if isinstance(targets, list) else [targets]

    def matches(path: str, target: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(target, path) is not None
        return path == target or path.endswith(f".{target}")

    missing = [target for target in asked if not any(matches(path, target) for path in names.values())]
    if missing:
        ends = {path.rpartition(".")[2] for path in names.values()}
        known = sorted(end for end in ends if not end.isdigit())
        raise ConfigError(
            f"target_modules: {', '.join(missing)} matches no module of {config.model}. There are: "
            f"{', '.join(known)}."
        )
    output = names.get(id(model.get_output_embeddings()))
    if config.trainer in REFERENCE_TRAINERS and output and any(matches(output, target) for target in asked):
        raise ConfigError(
            f"target_modules: it matches {output}, whose weight the loss of {config.trainer} reads past the "
            "adapter, which would never train. Leave it out."
        )


def _trained_rows(model: PreTrainedModel, tokens: list[int]) -> list[int] | dict[str, list[int]]:
    """Where the rows of new tokens lie: in the embedding, and in the output where it has rows of its own.

    Without those of the output a model could read the end of a turn, and never write it.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is embedding.weight:  # peft follows a tied weight by itself
        return tokens
    names = {id(module): path.rpartition(".")[2] for path, module in model.named_modules()}
    return {names[id(module)]: tokens for module in (embedding, output)}


def adapt_output(model: Any) -> None:
    """Makes an output layer with trained rows look like a plain one to TRL's fused losses.

    They read its weight and bias and do not call it. peft 0.21 shows the weight alone, and cannot put its
    rows into one that FSDP2 has sharded.
    """
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inner = getattr(output, "original_module", None)
    if inner is None:
        return
    output.__dict__["bias"] = inner.bias  # not as a parameter of its own, which would be saved twice
    rows = output.token_adapter
    rows.get_merged_weights = lambda adapters: _merged_rows(rows, adapters)


def _merged_rows(rows: Any, adapters: list[str]) -> torch.Tensor:
    """The weight of a layer with its trained rows in place, whole on each rank: (vocabulary, hidden)."""
    import torch

    weight: torch.Tensor = fsdp.whole(rows.base_layer.weight)
    for name in adapters:
        index = torch.tensor(rows.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, index, fsdp.whole(rows.trainable_tokens_delta[name]).to(weight))
    return weight


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
