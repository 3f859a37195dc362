"""Read `data.mix`: check its sources, and complete each with what it takes from `data`.

A source has the keys of `data`. What it does not set, it takes from there. Keys that say the same thing are
taken together: a source with columns of its own takes none, and one that names a split takes no fraction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from trainers.config.consistency import row_problems
from trainers.config.errors import ConfigError
from trainers.config.field_types import read_sources
from trainers.config.mix import FIELDS, SOURCE_KEYS, TAKEN, Share
from trainers.config.names import COLUMN_ALIASES, COLUMN_KEYS
from trainers.config.schema import TrainConfig
from trainers.config.values import Value, nearest, validate

# A source that sets one of these takes none of them from `data`.
TOGETHER = (
    {*COLUMN_KEYS, "prompt_format"},
    {"valid_split", "valid_fraction"},
    {"test_split", "test_fraction"},
)


def read_mix(values: Mapping[str, Value]) -> Value | None:
    """Return the value of `mix` with everything that each source takes from `data`, and with all names.

    None if there is no mix. `values` are those of the user. What is returned can be read again, with the same
    result.

    Raises:
        ConfigError: one line for each mistake.
    """
    mix = values.get("mix")
    if mix is None:
        return None
    try:
        sources = read_sources(mix.value)
    except ValueError as error:
        raise ConfigError(f"{mix.source}: {mix.name}: {error}.") from None
    if sources is None:
        return None
    if "data_path" in values:
        path = values["data_path"]
        raise ConfigError(
            f"{path.source}: {path.name}: data.mix ({mix.source}) has the paths of its sources. Keep one of "
            "the two."
        )
    if not isinstance(sources, list) or not sources:
        raise ConfigError(
            f"{mix.source}: {mix.name}: it must be a list of sources, such as [{{path: data}}]."
        )
    entries: list[dict[str, Any]] = []
    found: list[str] = []
    for number, given in enumerate(sources):
        try:
            entries.append(_read(number, given, values))
        except ConfigError as error:
            found += str(error).splitlines()
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))
    _name(entries, mix)
    _check_shares(entries, mix)
    return Value(entries, mix.source, mix.name, places=mix.places)


def places_of(mix: Value) -> dict[str, str]:
    """Return where each key of each source is, by the name that messages use, such as `data.mix[0].path`."""
    found = {}
    for (number, *keys), place in mix.places.items():
        if keys[:1] == ["column_mapping"] and keys[1:]:
            keys[1] = COLUMN_ALIASES.get(keys[1], keys[1])
        found[".".join((f"data.mix[{number}]", *keys))] = place
    return found


def _read(number: int, given: Any, values: Mapping[str, Value]) -> dict[str, Any]:
    """Return one source with all that it takes from `data`."""
    mix = values["mix"]
    label = f"data.mix[{number}]"

    def at(*keys: str) -> str:
        return mix.places.get((str(number), *keys), mix.places.get((str(number),), mix.source))

    def unknown(keys: tuple[str, ...], valid: list[str]) -> ConfigError:
        return ConfigError(f"{at(*keys)}: unknown key '{label}.{'.'.join(keys)}'. {nearest(keys[-1], valid)}")

    if not isinstance(given, dict):
        raise ConfigError(f"{at()}: {label}: it must be a mapping of keys, such as {{path: data}}.")
    share: dict[str, Value] = {}
    own: dict[str, Value] = {}
    for key, value in given.items():
        entry = Value(value, at(key), f"{label}.{key}")
        if key in Share.model_fields:
            share[key] = entry
        elif key in SOURCE_KEYS:
            own[SOURCE_KEYS[key]] = entry
        elif key != "column_mapping":
            raise unknown((key,), [*Share.model_fields, *SOURCE_KEYS, "column_mapping"])
    columns = given.get("column_mapping") or {}
    if not isinstance(columns, dict):
        raise ConfigError(f"{at('column_mapping')}: {label}.column_mapping must be a mapping of keys.")
    for key, value in columns.items():
        name = COLUMN_ALIASES.get(key, key)
        if name not in COLUMN_KEYS:
            raise unknown(("column_mapping", key), list(COLUMN_KEYS))
        own[name] = Value(value, at("column_mapping", key), f"{label}.column_mapping.{key}")
    if "data_path" not in own:
        raise ConfigError(f"{at()}: {label}.path: it is missing. Give a folder, a file, or a dataset id.")
    asked = validate(Share, share)
    if asked.weight is not None and asked.rows is not None:
        raise ConfigError(f"{at('rows')}: {label}.rows: weight already sets the share. Keep one of the two.")
    kept = {name: value for name, value in values.items() if name in FIELDS and not _replaced(name, own)}
    read = {**kept, **own}
    trainer = {"trainer": values["trainer"]} if "trainer" in values else {}
    config = validate(TrainConfig, {**trainer, **read})
    if wrong := row_problems(config):
        raise ConfigError("\n".join(f"{read[n].source}: {read[n].name}: {text}" for n, text in wrong))
    plain = config.model_dump(mode="json", include={*read, "chat_template"})
    flat = {
        FIELDS[name]: value for name, value in plain.items() if name in FIELDS and name not in COLUMN_KEYS
    }
    mapped = {name: value for name, value in plain.items() if name in COLUMN_KEYS}
    if asked.rows == 0 and not (config.validates or config.tests):
        raise ConfigError(
            f"{at('rows')}: {label}.rows: 0 means that it is only evaluated. It needs a valid_split."
        )
    own_share = asked.model_dump(exclude_none=True)
    return {**own_share, **flat, **({"column_mapping": mapped} if mapped else {})}


def _replaced(name: str, own: Mapping[str, Value]) -> bool:
    """Return whether a source does not take a field from `data`, since it has a key that replaces it."""
    return name in own or any(name in group and group & {*own} for group in TOGETHER)


def _name(entries: list[dict[str, Any]], mix: Value) -> None:
    """Name the sources that have no name: after the end of their path, and the split where two are alike.

    Raises:
        ConfigError: two sources have one name, or a name is that of another measure.
    """
    short = [_plain(_last(entry["path"])) or "data" for entry in entries]
    for number, (entry, name) in enumerate(zip(entries, short, strict=True)):
        split = _plain(entry.get("train_split", "train"))
        entries[number] = {"name": name if short.count(name) == 1 else f"{name}_{split}"[:64], **entry}
    for number, entry in enumerate(entries):
        name = entry["name"]
        place = mix.places.get((str(number), "name"), mix.places.get((str(number),), mix.source))
        if name.lower() in TAKEN:
            raise ConfigError(
                f"{place}: data.mix[{number}].name: eval_{name}_loss is the name of another measure. Give "
                "the source another name."
            )
        same = [entries.index(other) for other in entries[:number] if other["name"] == name]
        if same:
            raise ConfigError(
                f"{place}: data.mix[{number}].name: data.mix[{same[0]}] is also named '{name}'. Give each "
                "source a name of its own."
            )


def _plain(text: str) -> str:
    """Return a text with the characters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _last(path: str) -> str:
    """Return the last part of a path or a hub id, without the suffix of a file."""
    name = PurePath(path).name
    return re.sub(r"\.(csv|jsonl?|parquet)$", "", name)[:40]


def _check_shares(entries: list[dict[str, Any]], mix: Value) -> None:
    """Check that each source has a share if one has a weight, and that a weight has another to compare with.

    Raises:
        ConfigError: a share is missing.
    """
    if all(entry.get("rows") == 0 for entry in entries):
        raise ConfigError(f"{mix.source}: {mix.name}: no source is trained on, since all have rows: 0.")
    weighed = [number for number, entry in enumerate(entries) if "weight" in entry]
    without = [n for n, entry in enumerate(entries) if "weight" not in entry and "rows" not in entry]
    if weighed and without:
        place = mix.places.get((str(without[0]),), mix.source)
        raise ConfigError(
            f"{place}: data.mix[{without[0]}]: it has no weight and no rows, but data.mix[{weighed[0]}] has "
            "a weight. Give each source one of the two."
        )
    if len(weighed) == 1:
        place = mix.places.get((str(weighed[0]), "weight"), mix.source)
        raise ConfigError(
            f"{place}: data.mix[{weighed[0]}].weight: no other source has a weight to compare it with. Set "
            "rows instead, or give the others a weight."
        )


def saved_template(mix: Value) -> str | None:
    """Return the template that the tokenizer is saved with, where `data` does not name one.

    Raises:
        ConfigError: the sources have different templates.
    """
    found = list(dict.fromkeys(entry["chat_template"] for entry in mix.value if entry["chat_template"]))
    if len(found) > 1:
        raise ConfigError(
            f"{mix.source}: data.chat_template: the sources have different templates ({', '.join(found)}). "
            "Set data.chat_template to the one that the tokenizer is saved with."
        )
    return found[0] if found else None
