"""`phalanx schema`: the JSON schema of a config file."""

from __future__ import annotations

import json

import pytest
from fakes import run_command

from launcher.commands.schema import json_schema
from launcher.config import LaunchConfig, SlurmConfig
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig


def test_the_schema_has_every_section(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["schema"], monkeypatch) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"] == "PhalanxConfig"
    assert {"task", "base_model", "project_name", "data", "params", "hub", "launch", "slurm"} <= set(
        schema["properties"]
    )


def test_the_json_schema_has_every_key_and_no_dangling_reference() -> None:
    schema = json_schema()
    kinds = {"object", "array", "string", "integer", "number", "boolean", "null"}
    definitions = schema["$defs"]

    def walk(node: object) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        elif isinstance(node, dict):
            assert node.get("type", "object") in kinds or isinstance(node["type"], dict)  # a field named type
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in definitions
            for item in node.values():
                walk(item)

    walk(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert set(definitions["Params"]["properties"]) == {*TrainConfig.model_fields, *ALIASES, *SWITCHES}
    assert set(definitions["LaunchConfig"]["properties"]) == set(LaunchConfig.model_fields)
    assert set(definitions["SlurmConfig"]["properties"]) == set(SlurmConfig.model_fields)
    assert set(definitions["Hub"]["properties"]) == {"username", "token", "push_to_hub"}
    assert schema["required"] == ["task", "data"]
    for section in (schema, *definitions.values()):
        assert section["additionalProperties"] is False
