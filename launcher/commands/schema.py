"""`phalanx schema`: print the JSON schema of a config file, for editors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, Literal

HELP = "print the JSON schema of a config file, for editors"
USAGE = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run() -> int:
    print(json.dumps(json_schema(), indent=2))
    return 0


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file."""
    from pydantic import ConfigDict, Field, create_model

    from launcher.config import LaunchConfig, SlurmConfig
    from trainers.config.field_types import OptionalText
    from trainers.config.mix import SOURCE_KEYS, Share
    from trainers.config.names import ALIASES, COLUMN_KEYS, HUB_KEYS, SWITCHES, TASKS, TOP_KEYS
    from trainers.config.schema import TrainConfig

    fields = TrainConfig.model_fields

    def pick(keys: Mapping[str, str]) -> dict[str, Any]:
        return {key: (fields[name].annotation, fields[name]) for key, name in keys.items()}

    strict = ConfigDict(extra="forbid")
    mapping = create_model("ColumnMapping", __config__=strict, **pick({name: name for name in COLUMN_KEYS}))
    share = {name: (field.annotation, field) for name, field in Share.model_fields.items()}
    columns: dict[str, Any] = {"column_mapping": (mapping, {})}
    own = {
        **share,
        **pick(SOURCE_KEYS),
        "path": (str, Field(..., description=fields["data_path"].description)),
    }
    source: Any = create_model("Source", __config__=strict, **own, **columns)
    columns["mix"] = (list[source] | None, fields["mix"])
    data = create_model("Data", __config__=strict, **pick(SOURCE_KEYS), **columns)
    hub = create_model("Hub", __config__=strict, **pick({name: name for name in HUB_KEYS}))
    params: dict[str, Any] = pick(ALIASES)
    for key, (name, on, off) in SWITCHES.items():
        params[key] = (bool, Field(on == "full", description=f"true: {name} is {on}. false: it is {off}."))
    top_level: dict[str, Any] = {
        "task": (Literal[TASKS], ...),
        "backend": (OptionalText, Field("local", description="AutoTrain's key; only local.")),
        **pick(TOP_KEYS),
        "data": (data, ...),
        "params": (create_model("Params", __base__=TrainConfig, **params), {}),
        "hub": (hub, {}),
        "launch": (LaunchConfig, {}),
        "slurm": (SlurmConfig, {}),
    }
    schema: dict[str, Any] = create_model("PhalanxConfig", __config__=strict, **top_level).model_json_schema()
    return schema
