"""The effective config of a run: validated values, the source of each, and notes on what was derived."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainers.config.consistency import problems, without_effect
from trainers.config.errors import ConfigError
from trainers.config.hub_paths import token_file
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.redaction import HIDDEN, has_secret, remember
from trainers.config.schema import BLOCK_SIZE_LIMIT, SECRET_FIELDS, TrainConfig

MANY = 20  # a message lists at most this many names

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Value:
    """A value and its source, such as `config.yaml:12` or `flag --lr`. `name` is the user's spelling."""

    value: Any
    source: str
    name: str
    switch: str = ""  # true or false, if the name is one of SWITCHES

    @property
    def written(self) -> Any:
        return self.switch or self.value


@dataclass
class Settings:
    """The effective config of a run: the values, the source of each, and notes on what was derived."""

    train: TrainConfig
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def public(self) -> dict[str, Any]:
        """Return the values as JSON types, without secrets."""
        return self.train.public()


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint: the closest valid name, else all valid names if there are at most MANY."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return (
        f"Valid: {', '.join(valid)}." if len(valid) <= MANY else "phalanx train --help lists the valid ones."
    )


def put(values: dict[str, Value], name: str, new: Value) -> None:
    """Store a value under the field that `name` stands for.

    Raises:
        ConfigError: another spelling of the field has a different value.
    """
    if name in SWITCHES:
        name, new = _switched(name, new)
    name = ALIASES.get(name, name)
    old = values.get(name)
    if old is not None and not _agree(old, new):
        this, other = (HIDDEN, HIDDEN) if name in SECRET_FIELDS else (new.written, old.written)
        raise ConfigError(
            f"{new.source}: {new.name}: {this} contradicts {old.name}: {other} ({old.source}); "
            f"both set {name}. Keep one."
        )
    if old is None or not new.switch:  # a switch that is on does not say which choice
        values[name] = new


def _switched(name: str, new: Value) -> tuple[str, Value]:
    """Return the field that a switch sets, and the value that it stands for."""
    field, on, off = SWITCHES[name]
    word = str(new.value).lower()
    if word not in ("true", "false"):
        raise ConfigError(f"{new.source}: {new.name} must be true or false, not {new.value!r}.")
    return field, Value(on if word == "true" else off, new.source, new.name, word)


def _agree(one: Value, other: Value) -> bool:
    """Return whether two spellings agree. For a switch, every choice except none is on."""
    if one.switch or other.switch:
        one_off, other_off = (str(entry.value).lower() in ("none", "no", "false") for entry in (one, other))
        return one_off == other_off
    return str(one.value) == str(other.value)


def validate(schema: type[Model], values: Mapping[str, Value]) -> Model:
    """Validate values against a schema.

    Raises:
        ConfigError: one line for each mistake, with its source, its name, and what is allowed; or a value
            that is recorded has a secret.
    """
    try:
        valid = schema.model_validate({name: entry.value for name, entry in values.items()})
    except ValidationError as error:
        found: dict[str, str] = {}
        for item in error.errors():
            name = str(item["loc"][0])
            entry = values.get(name)
            label = f"{entry.source}: {entry.name}" if entry else name
            found.setdefault(name, f"{label}: {_explain(item, schema, name)}")
        raise ConfigError("\n".join(found.values())) from None
    for name, entry in values.items():
        if name not in SECRET_FIELDS and has_secret(entry.value):
            raise ConfigError(
                f"{entry.source}: {entry.name}: {entry.value} has a secret, which run.json and logs would "
                "show. Give a token as hub.token or HF_TOKEN, and an address without its password."
            )
    return valid


def _explain(item: Any, schema: type[BaseModel], name: str) -> str:
    kind, given = item["type"], item.get("input")
    given = HIDDEN if name in SECRET_FIELDS else "null" if given is None else repr(given)
    if kind == "extra_forbidden":
        return f"unknown key. {nearest(name, schema.model_fields)}"
    default = schema.model_fields[name].default
    sample = 1 if default is None else default
    if kind in ("float_parsing", "float_type"):
        return f"{given} is not a number. Write for example {name}: {sample}."
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{given} is not a whole number. Write for example {name}: {sample}."
    if kind in ("bool_parsing", "bool_type"):
        return f"{given} is not true or false."
    if kind == "string_type":
        return f"{given} is not text. Put it in quotes."
    if kind == "string_pattern_mismatch":
        signs = item["ctx"]["pattern"].removeprefix("^[A-Za-z0-9").removesuffix("]+$").replace("\\", "")
        return f"{given} has a character that is not allowed. Allowed: letters, digits and {' '.join(signs)}"
    if kind == "literal_error":
        return f"{given} does not exist. Allowed: {item['ctx']['expected']}."
    if item["msg"].startswith("Input should be "):
        return f"{given} must be {item['msg'].removeprefix('Input should be ')}."
    return f"{given}: {item['msg'].removeprefix('Value error, ')}."


def resolve(values: Mapping[str, Value]) -> Settings:
    """Return the effective config: validate the values, and derive those that the user left open.

    A note states each value that AutoTrain would derive silently.

    Raises:
        ConfigError: one line for each mistake.
    """
    if "token" not in values or values["token"].value is None:
        values = {**values, **_default_token()}
    remember(values["token"].value if "token" in values else None)
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
    if config.per_device_eval_batch_size is None:
        derive("per_device_eval_batch_size", config.batch_size, "batch_size")
    if config.data_seed is None:
        derive("data_seed", config.seed, "seed")
    if config.run_name is None and os.environ.get("WANDB_NAME") and config.log == "wandb":
        derive("run_name", os.environ["WANDB_NAME"], "environment WANDB_NAME")
    elif config.run_name is None:
        derive("run_name", Path(config.project_name).name, "project_name")
    for name, why in without_effect(config).items():
        if not sources[name].startswith("derived"):
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
    return Settings(effective, sources, notes)


def changed(settings: Settings, changes: Mapping[str, Value]) -> Settings:
    """Return the settings with other values for some fields; derived values are derived again."""
    chosen = {
        name: Value(getattr(settings.train, name), source, name)
        for name, source in settings.sources.items()
        if source != "default" and not source.startswith("derived")
    }
    new = resolve({**chosen, **changes})
    new.notes = list(dict.fromkeys([*settings.notes, *new.notes]))
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
