"""JSON that is nested too deeply is malformed JSON, for every reader of files that may be damaged."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from places import REPO

from trainers.config.errors import ConfigError
from trainers.config.json_text import parse_json
from trainers.storage import state_files
from trainers.storage.identity import recorded_id
from trainers.storage.manifest import read_manifest

# Where json.loads may stay: what is read there was written by a process of the same start, or is shipped.
TRUSTED = {
    "trainers/config/json_text.py",
    "trainers/model/place.py",
    "trainers/warm.py",
    "trainers/rank/forking.py",
    "launcher/supervise/warm_parent.py",
    "launcher/plan/accelerate_config.py",
}
DEEP = "[" * 100_000


def test_deep_nesting_is_an_error_of_json() -> None:
    with pytest.raises(json.JSONDecodeError, match="nested too deeply"):
        parse_json(DEEP)


def test_a_deeply_nested_state_file_is_damaged(tmp_path: Path) -> None:
    for name in ("manifest.json", "finished.json", "run.json"):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(ConfigError, match=r"finished\.json is damaged: .*nested too deeply.*Remove it"):
        state_files.read_object(tmp_path / "finished.json", "Remove it.")
    with pytest.raises(ValueError, match=r"its manifest\.json cannot be read: nested too deeply"):
        read_manifest(tmp_path)
    assert recorded_id(tmp_path) == ""
    (tmp_path / "lines.jsonl").write_text(f'{{"a": 1}}\n{DEEP}\n')
    assert state_files.read_lines(tmp_path / "lines.jsonl") == ([{"a": 1}], [2])


def test_no_other_module_parses_json_that_may_be_damaged() -> None:
    found = {
        str(path.relative_to(REPO))
        for folder in ("launcher", "trainers")
        for path in sorted((REPO / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load")
    }
    assert found <= TRUSTED, "use config/json_text.py"
