"""LoRA: its settings, its allowed targets, and the embeddings of new tokens that it trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.mix import data_configs
from trainers.config.schema import TrainConfig
from trainers.data.templates import TEMPLATES
from trainers.model import fsdp
from trainers.model.reach import below_any, is_below

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel


def lora_config(
    config: TrainConfig, new_tokens: list[int], model: PreTrainedModel, unreached: Sequence[str] = ()
) -> LoraConfig | None:
    """Return LoRA's settings, or None for full training. Tokens added to the vocabulary are trained too.

    The modules of `unreached` get no adapter, because it would get no gradient (reach.py).

    Raises:
        ConfigError: peft cannot train those tokens here, or the target modules are wrong.
    """
    if not config.peft:
        return None
    from peft import LoraConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if new_tokens and is_deepspeed_zero3_enabled():
        used = [one.chat_template for one in (config, *data_configs(config))]
        adding = dict.fromkeys(name for name in used if name in TEMPLATES and TEMPLATES[name][1])
        raise ConfigError(
            f"chat_template: {' or '.join(map(str, adding))} adds tokens, and ZeRO-3 cannot train their "
            "embeddings together with an adapter. Use distributed_backend: fsdp, launch.zero_stage: 2, or "
            "chat_template: tokenizer."
        )
    _check_targets(model, config, unreached)
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=config.lora_targets,
        exclude_modules=below_any(unreached) if unreached else None,
        trainable_token_indices=_trained_rows(model, new_tokens) if new_tokens else None,
        bias="none",
        task_type=config.kind.peft_task,
        revision=config.revision,
    )


def _check_targets(model: PreTrainedModel, config: TrainConfig, unreached: Sequence[str]) -> None:
    """Check target_modules. dpo and kto read the weight of the output layer without an adapter on it.

    Raises:
        ConfigError: a name or an expression matches nothing, or it matches the output layer of dpo or kto.
    """
    targets = config.lora_targets
    if targets is None or targets == "all-linear":
        return
    names = {
        id(module): path
        for path, module in model.named_modules()
        if path and not any(is_below(path, part) for part in unreached)
    }
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
            f"target_modules: {', '.join(missing)} matches no module of {config.model}. It has: "
            f"{', '.join(known)}."
        )
    output = names.get(id(model.get_output_embeddings()))
    if config.kind.reads_head_weight and output and any(matches(output, target) for target in asked):
        raise ConfigError(
            f"target_modules: it matches {output}. The loss of {config.trainer} reads its weight without the "
            f"adapter, so the adapter would never train. Leave {output} out."
        )


def _trained_rows(model: PreTrainedModel, tokens: list[int]) -> list[int] | dict[str, list[int]]:
    """Return where new tokens have rows: in the embedding, and in the output layer if it is not tied.

    Without the rows of the output layer, a model could read the end of a turn but never write it.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is embedding.weight:  # peft follows a tied weight by itself
        return tokens
    names = {id(module): path.rpartition(".")[2] for path, module in model.named_modules()}
    return {names[id(module)]: tokens for module in (embedding, output)}


def adapt_output(model: Any) -> None:
    """Make an output layer with trained rows look like a plain one to TRL's fused losses.

    They read its weight and bias, and do not call it. peft 0.21 exposes only the weight, and cannot put its
    rows into a weight that FSDP2 has sharded.
    """
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inner = getattr(output, "original_module", None)
    if inner is None:
        return
    output.__dict__["bias"] = inner.bias  # not as a parameter, which would be saved twice
    rows = output.token_adapter
    rows.get_merged_weights = lambda adapters: _merged_rows(rows, adapters)


def _merged_rows(rows: Any, adapters: list[str]) -> torch.Tensor:
    """Return the full weight of a layer with its trained rows, on each rank: (vocabulary, hidden)."""
    import torch

    weight: torch.Tensor = fsdp.full_tensor(rows.base_layer.weight)
    for name in adapters:
        index = torch.tensor(rows.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, index, fsdp.full_tensor(rows.trainable_tokens_delta[name]).to(weight))
    return weight
