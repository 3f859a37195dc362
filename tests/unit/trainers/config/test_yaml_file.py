"""`${VAR}` in a config file: where it is replaced, and where a variable must be set."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainers.config.errors import ConfigError
from trainers.config.file import FileValues, read_config_file
from trainers.config.yaml_file import expand


def read(folder: Path, *lines: str, **environ: str) -> FileValues:
    """Read a config that has these lines from line 2 on."""
    path = folder / "c.yaml"
    path.write_text("\n".join(["task: llm-sft", *lines, ""]))
    return read_config_file(path, environ)


@pytest.mark.parametrize(
    "lines",
    [
        ("base_model: ${PX_UNSET}",),
        ("data: {path: '${PX_UNSET}'}",),
        ("data: {column_mapping: {text_column: '${PX_UNSET}'}}",),
        ("params: {run_name: '${PX_UNSET}'}",),
        ("params: {target_modules: [q_proj, '${PX_UNSET}']}",),
        ("launch: {num_processes: '${PX_UNSET}'}",),
        ("slurm: {account: '${PX_UNSET}'}",),
    ],
    ids=lambda lines: lines[0],
)
def test_outside_of_the_hub_section_an_unset_variable_is_refused(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml:2: the environment variable PX_UNSET is not set"):
        read(tmp_path, *lines)


def test_a_variable_is_optional_only_if_the_caller_says_so() -> None:
    with pytest.raises(ConfigError, match="PX_UNSET is not set"):
        expand("${PX_UNSET}", "c.yaml:2", {})
    assert expand({"a": ["${PX}"]}, "c.yaml:2", {"PX": "x"}) == ({"a": ["x"]}, "")
    assert expand("${PX_UNSET}", "c.yaml:2", {}, optional=True) == (None, " (${PX_UNSET}, not set)")


def test_variables_in_a_list_are_replaced(tmp_path: Path) -> None:
    found = read(tmp_path, "params: {target_modules: ['${PX_A}_proj', v_proj]}", PX_A="q")
    assert found.train["target_modules"].value == ["q_proj", "v_proj"]


def test_only_the_given_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_A", "of the process")
    assert read(tmp_path, "base_model: ${PX_A}", PX_A="given").train["model"].value == "given"
