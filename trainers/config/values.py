"""A value of the config with its source, and its validation: one line for each mistake, with its place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainers.config.errors import ConfigError
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.redaction import HIDDEN, has_secret
from trainers.config.schema import SECRET_FIELDS

MANY = 20  # a message lists at most this many names

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Value:
    """A value and its source, such as `config.yaml:12` or `flag --lr`. `name` is the user's spelling.

    `places` has the source of each key inside the value, by its path, such as ("0", "weight").
    """

    value: Any
    source: str
    name: str
    switch: str = ""  # true or false, if the name is one of SWITCHES
    places: Mapping[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def written(self) -> Any:
        return self.switch or self.value


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
