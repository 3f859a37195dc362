"""The sources of `data.mix`. Each is the config of a run that has only this source, with a share of an epoch.

A config that is resolved has them complete (mix_reader.py): with what they take from `data`, and with names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trainers.config.consistency import without_effect
from trainers.config.errors import ConfigError
from trainers.config.field_types import Float, Int
from trainers.config.names import COLUMN_KEYS, DATA_KEYS
from trainers.config.schema import TrainConfig
from trainers.config.values import is_chosen

# Names that no source can have: eval_NAME_loss is another measure.
TAKEN = ("loss", "nll", "aux")
NAME = r"^[A-Za-z0-9_-]+$"
SOURCE_KEYS = {key: field for key, field in DATA_KEYS.items() if key != "mix"}
FIELDS = {**{field: key for key, field in SOURCE_KEYS.items()}, **{name: name for name in COLUMN_KEYS}}


class Share(BaseModel):
    """What only a source has: its name, and how much of an epoch it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(
        None,
        pattern=NAME,
        max_length=64,
        description="Name of the source, in counts and in eval_NAME_loss. Default: the end of its path.",
    )
    weight: Float | None = Field(
        None,
        gt=0,
        description="Share of the source among all sources that have a weight. An epoch has as many samples "
        "as these sources together.",
    )
    rows: Int | None = Field(
        None,
        ge=0,
        description="Samples of the source in an epoch. null: all, if no source has a weight. 0: it is only "
        "evaluated.",
    )


@dataclass(frozen=True)
class Source:
    """A source of a mix."""

    number: int
    name: str
    weight: float | None
    rows: int | None
    config: TrainConfig  # of a run that has only this source

    @property
    def key(self) -> str:
        return f"data.mix[{self.number}]"

    @property
    def trains(self) -> bool:
        """Whether the source is trained on, and not only evaluated."""
        return self.rows != 0

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the source in a ConfigError that the block raises."""
        try:
            yield
        except ConfigError as error:
            text, more = str(error.args[0]), error.args[1:]
            own = text.startswith("data.")
            named = f"{self.key}{text.removeprefix('data')}" if own else f"{self.key} ({self.name}): {text}"
            raise ConfigError(named, *more) from error


def sources_of(config: TrainConfig) -> list[Source]:
    """Return the sources of a config that is resolved: none if it has no mix."""
    return [_source(config, number, entry) for number, entry in enumerate(config.mix or [])]


def data_configs(config: TrainConfig) -> list[TrainConfig]:
    """Return the config of each source; the config itself if it has no mix."""
    return [source.config for source in sources_of(config)] or [config]


def source_named(config: TrainConfig, name: str) -> Source:
    """Return the source that `--source` names.

    Raises:
        ConfigError: there is no mix, or no such source in it.
    """
    sources = sources_of(config)
    if not sources:
        raise ConfigError("--source: the config has no data.mix, so it has no sources to choose from.")
    found = [source for source in sources if source.name == name]
    if not found:
        names = ", ".join(source.name for source in sources)
        raise ConfigError(f"--source: there is no source '{name}' in data.mix. Allowed: {names}.")
    return found[0]


def value_sources(config: TrainConfig, source: Source, sources: Mapping[str, str]) -> dict[str, str]:
    """Return where each value of a source of the mix is from. `sources` says it for those of `config`."""
    found = dict(sources)
    for name in FIELDS:
        in_data, given = is_chosen(sources.get(name, "default")), name in source.config.model_fields_set
        value = getattr(source.config, name)
        if given and in_data and value == getattr(config, name):
            continue  # taken from data
        # A source that is resolved always has its template, even if nobody has chosen it.
        default = not given or (not in_data and value == TrainConfig.model_fields[name].get_default())
        found[name] = "default" if default else f"{source.key}.{'.'.join(keys_of(name))}"
    return found


def _source(config: TrainConfig, number: int, entry: Mapping[str, Any]) -> Source:
    given = {field: entry[key] for key, field in SOURCE_KEYS.items() if key in entry}
    given |= entry.get("column_mapping", {})
    fields = TrainConfig.model_fields
    own = {name: given.get(name, fields[name].get_default()) for name in FIELDS}
    chosen = (config.model_fields_set - {*FIELDS, "mix"}) | set(given)
    alone = TrainConfig.model_construct(_fields_set=chosen, **{**dict(config), **own, "mix": None})
    return Source(number, entry["name"], entry.get("weight"), entry.get("rows"), alone)


def idle_fields(config: TrainConfig) -> dict[str, str]:
    """Return the keys that the user set and that have no effect in this run: the key -> the reason.

    A key of `data` has an effect if one source takes it and reads it.
    """
    sources = sources_of(config)
    if not sources:
        return without_effect(config)
    each = [without_effect(source.config) for source in sources]
    found: dict[str, str] = {}
    for name in TrainConfig.model_fields:
        if name not in config.model_fields_set or name in ("mix", "chat_template"):
            continue
        whys = [_why_idle(name, config, source, idle) for source, idle in zip(sources, each, strict=True)]
        if all(whys):
            found[name] = whys[0]
    for source, idle in zip(sources, each, strict=True):
        for name, why in idle.items():
            if name in FIELDS and not _taken(name, config, source):
                found[f"{source.key}.{'.'.join(keys_of(name))}"] = why
    return found


def _why_idle(name: str, config: TrainConfig, source: Source, idle: Mapping[str, str]) -> str:
    if name in FIELDS and not _taken(name, config, source):
        return "each source has its own"
    return idle.get(name, "")


def _taken(name: str, config: TrainConfig, source: Source) -> bool:
    """Return whether a source has the value of `data`."""
    both = name in config.model_fields_set and name in source.config.model_fields_set
    return both and getattr(config, name) == getattr(source.config, name)


def keys_of(field: str) -> tuple[str, ...]:
    """Return the keys of a field inside a source."""
    return ("column_mapping", field) if field in COLUMN_KEYS else (FIELDS[field],)
