"""The check of the disk before a start asks only for what is left to write."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import fake_checkpoint

from launcher.cli import main
from launcher.plan import disk
from trainers.config.schema import TrainConfig
from trainers.storage.ending import MERGE, Ending
from trainers.storage.manifest import entry_of, read_manifest
from trainers.storage.run_folder import claim

STEPS = {"steps": {"max_steps": 4}, "epochs": {"epochs": 2}}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without a free byte, and a base model of a million parameters."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    monkeypatch.setattr(disk, "size_of_model", lambda model: 1_000_000)


def trained(folder: Path, finished: bool, done: list[str], **values: object) -> TrainConfig:
    """Make the folder of a run that was trained to its last step, and return the config of its resume."""
    config = TrainConfig(trainer="sft", project_name=str(folder), **values)
    claim(folder, config)
    checkpoint = fake_checkpoint(folder, 4, config=config.public())
    (checkpoint / disk.STATE).write_text('{"max_steps": 4}')
    manifest = read_manifest(checkpoint)
    files = [entry_of(checkpoint, checkpoint / entry.path) for entry in manifest.files]
    replace(manifest, files=files).write(checkpoint)
    if finished:
        Ending(step=4, metrics={}, model_step=4, done=done).write(folder)
        record = {"config": {name: {"value": value} for name, value in config.public().items()}}
        (folder / "run.json").write_text(json.dumps(record))
    return config.model_copy(update={"resume": True})


def needs(folder: Path, config: TrainConfig) -> str:
    with pytest.raises(OSError, match="project_name: ") as error:
        disk.check_disk(folder, config)
    return str(error.value.strerror)


@pytest.mark.parametrize("length", STEPS)
@pytest.mark.parametrize("actions", [{}, {"push_to_hub": True, "username": "me"}], ids=["nothing", "upload"])
def test_a_finished_run_needs_no_room(
    full: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: str, actions: dict[str, object]
) -> None:
    config = trained(tmp_path, True, [], **STEPS[length], **actions)
    assert "the final model needs about 4.0 MB" in needs(
        tmp_path, config
    )  # it has no model: it is saved again
    monkeypatch.setattr(Ending, "why_damaged", lambda *_, **__: None)
    disk.check_disk(tmp_path, config)
    longer = config.model_copy(update={"max_steps": 8})
    assert "a checkpoint of this run needs about 12.0 MB, and its final model" in needs(tmp_path, longer)


@pytest.mark.parametrize("length", STEPS)
def test_a_merge_that_is_left_needs_room_for_the_model(
    full: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: str
) -> None:
    monkeypatch.setattr(Ending, "why_damaged", lambda *_, **__: None)
    merges = {"peft": True, "merge_adapter": True, "mixed_precision": "bf16"}
    for name, done in (("left", []), ("done", [MERGE])):
        config = trained(tmp_path / name, True, done, **STEPS[length], **merges)
        if done:
            disk.check_disk(tmp_path / name, config)
        else:
            assert "the merged model needs about 2.0 MB" in needs(tmp_path / name, config)


@pytest.mark.parametrize("length", STEPS)
@pytest.mark.parametrize("resume", ["true", "path"])
def test_after_the_last_step_only_the_final_model_needs_room(
    full: None, tmp_path: Path, length: str, resume: str
) -> None:
    config = trained(tmp_path, False, [], **STEPS[length])
    if resume == "path":
        config = config.model_copy(update={"resume": str(tmp_path / "checkpoint-4")})
    assert needs(tmp_path, config).startswith("project_name: the final model needs about 4.0 MB (predicted)")
    longer = config.model_copy(update={"epochs": 3} if length == "epochs" else {"max_steps": 8})
    assert "a checkpoint of this run needs about" in needs(tmp_path, longer)


def test_a_disk_without_room_has_the_exit_code_of_a_full_disk(
    full: None,
    work: Path,
    hardware: object,
    packages: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("c.yaml").write_text(
        "task: llm-sft\nbase_model: model\nproject_name: my\nlog: none\ndata: {path: data}\n"
    )
    assert main(["show", "c.yaml"]) == 8
    message = capsys.readouterr().err
    assert message.startswith(
        "error: project_name: a checkpoint of this run needs about 12.0 MB, and its final"
    )
    assert message.endswith("Free some space, or give a project_name on another disk.\n")
