"""The effective config of a run: validated values, the source of each, and notes on what was derived."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.config.consistency import problems
from trainers.config.errors import ConfigError
from trainers.config.hub_paths import token_file
from trainers.config.mix import idle_fields
from trainers.config.mix_reader import places_of, read_mix, saved_template
from trainers.config.redaction import remember
from trainers.config.schema import BLOCK_SIZE_LIMIT, TrainConfig
from trainers.config.values import Value, validate


@dataclass
class Settings:
    """The effective config of a run: the values, the source of each, and notes on what was derived."""

    train: TrainConfig
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)  # where each key of a source is, by its name

    def public(self) -> dict[str, Any]:
        """Return the values as JSON types, without secrets."""
        return self.train.public()


def resolve(values: Mapping[str, Value]) -> Settings:
    """Return the effective config: validate the values, and derive those that the user left open.

    A note states each value that AutoTrain would derive silently.

    Raises:
        ConfigError: one line for each mistake.
    """
    if "token" not in values or values["token"].value is None:
        values = {**values, **_default_token()}
    remember(values["token"].value if "token" in values else None)
    mix = read_mix(values)
    if mix is not None:
        values = {**values, "mix": mix}
    config = validate(TrainConfig, values)
    sources = {
        name: values[name].source if name in values else "default" for name in TrainConfig.model_fields
    }
    notes: list[str] = []
    changes: dict[str, Any] = {}

    def derive(name: str, value: Any, why: str) -> None:
        changes[name] = value
        sources[name] = f"derived: {why}"

    if config.quantization and not config.peft and "quantization" not in values:
        derive("quantization", None, "AutoTrain's default int4 needs peft")
        notes.append(
            "quantization: AutoTrain's default int4 is not used, since peft is off and all weights are "
            "trained."
        )
    if config.merge_adapter and not config.peft:
        derive("merge_adapter", False, "peft is off")
        notes.append("merge_adapter: has no effect, since peft is off and there is no adapter.")
    if config.block_size == -1:
        length = min(config.model_max_length, BLOCK_SIZE_LIMIT)
        derive("block_size", length, f"block_size -1 is model_max_length, at most {BLOCK_SIZE_LIMIT}")
        if config.model_max_length > length:
            notes.append(
                f"block_size: {length} tokens, AutoTrain's value for -1, is the longest sample. To keep more "
                f"of long documents, set block_size up to model_max_length ({config.model_max_length})."
            )
    if config.save_strategy is None:
        derive(
            "save_strategy",
            "steps" if config.save_steps else "epoch",
            "steps if save_steps is set, else epoch",
        )
    if isinstance(config.block_size, list):
        parts = zip(("max_prompt_length", "max_completion_length"), config.block_size[1:], strict=False)
        for name, length in parts:
            if name not in values:
                derive(name, length, "block_size is a list")
    if not config.validates and config.eval_strategy != "no":
        derive("eval_strategy", "no", "there is no valid_split and no valid_fraction")
        if "eval_strategy" in values:
            notes.append("eval_strategy: has no effect, since there is no valid_split and no valid_fraction.")
    if mix is not None and "chat_template" not in values and (template := saved_template(mix)):
        derive("chat_template", template, "the sources have it")
    if config.per_device_eval_batch_size is None:
        derive("per_device_eval_batch_size", config.batch_size, "batch_size")
    if config.data_seed is None:
        derive("data_seed", config.seed, "seed")
    if config.run_name is None and os.environ.get("WANDB_NAME") and config.log == "wandb":
        derive("run_name", os.environ["WANDB_NAME"], "environment WANDB_NAME")
    elif config.run_name is None:
        derive("run_name", Path(config.project_name).name, "project_name")
    for name, why in idle_fields(config).items():
        if not sources.get(name, "").startswith("derived"):
            notes.append(f"{name}: has no effect, since {why}.")

    # model_copy keeps model_fields_set, which has the fields that the user set.
    effective = config.model_copy(update=changes)
    save, evaluate = effective.save_strategy, effective.eval_strategy
    if effective.load_best_model_at_end is None:
        aligned = evaluate != "no" and evaluate == save and effective.eval_steps == effective.save_steps
        why = "every save has an eval_loss" if aligned else "not every save has an eval_loss"
        sources["load_best_model_at_end"] = f"derived: {why}"
        effective = effective.model_copy(update={"load_best_model_at_end": aligned})
    if found := problems(effective):
        raise ConfigError("\n".join(_at(values, name) + f"{name}: {text}" for name, text in found))
    return Settings(effective, sources, notes, places_of(mix) if mix else {})


def changed(settings: Settings, changes: Mapping[str, Value]) -> Settings:
    """Return the settings with other values for some fields; derived values are derived again."""
    chosen = {
        name: Value(getattr(settings.train, name), source, name)
        for name, source in settings.sources.items()
        if source != "default" and not source.startswith("derived")
    }
    new = resolve({**chosen, **changes})
    new.notes = list(dict.fromkeys([*settings.notes, *new.notes]))
    new.places = settings.places
    return new


def _default_token() -> dict[str, Value]:
    """Find the hub token where huggingface_hub does: HF_TOKEN, else the file that `hf auth login` wrote."""
    if token := os.environ.get("HF_TOKEN"):
        return {"token": Value(token, "environment HF_TOKEN", "token")}
    file = token_file()
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError:
        return {}
    return {"token": Value(token, f"token file {file}", "token")} if token else {}


def _at(values: Mapping[str, Value], name: str) -> str:
    return f"{values[name].source}: " if name in values else ""
