"""Which checkpoint a run resumes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fakes import fake_checkpoint

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.storage.manifest import why_unusable
from trainers.storage.run_files import WRITTEN
from trainers.storage.run_folder import (
    claim,
    resume_checkpoint,
    set_aside_newer_checkpoints,
)

WEIGHTS = "model.safetensors"


def resuming(resume: bool | str) -> TrainConfig:
    return TrainConfig(resume=resume)


def test_without_resume_no_checkpoint_is_used(checkpoint: Path) -> None:
    assert resume_checkpoint(checkpoint.parent, resuming(False)) == (None, [])


def test_resume_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^resume: there is no run in .*Start without --resume"):
        resume_checkpoint(tmp_path, resuming(True))


def test_a_run_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert resume_checkpoint(tmp_path, resuming(True)) == (None, [])


def test_resume_uses_the_newest_that_verifies(checkpoint: Path) -> None:
    newer = fake_checkpoint(checkpoint.parent, 6)
    (newer / WEIGHTS).write_bytes(b"THE WEIGHTS")
    found, skipped = resume_checkpoint(checkpoint.parent, resuming(True))
    assert found == checkpoint
    assert skipped == [f"skipped {newer}: model.safetensors has changed since it was written"]


def test_a_checkpoint_that_was_copied_from_another_run_is_passed_over(tmp_path: Path) -> None:
    """`cp -r other/checkpoint-9 my-run/`. Checkpoints of earlier versions have no id, and are taken."""
    run, other = tmp_path / "my-run", tmp_path / "other"
    own = fake_checkpoint(run, 6, run_id="mine")
    fake_checkpoint(other, 9, run_id="another")
    fake_checkpoint(run, 3)
    copy = Path(shutil.copytree(other / "checkpoint-9", run / "checkpoint-9"))
    why = "another run wrote it, and it was copied here"
    assert resume_checkpoint(run, resuming(True)) == (own, [f"skipped {copy}: {why}"])
    with pytest.raises(ConfigError, match=f"^resume: {copy} cannot be used: {why}"):
        resume_checkpoint(run, resuming(str(copy)))
    shutil.rmtree(own)
    assert resume_checkpoint(run, resuming(True))[0] == run / "checkpoint-3"
    (run / "run.json").unlink()  # then nothing is known
    assert resume_checkpoint(run, resuming(True)) == (copy, [])


@pytest.mark.parametrize("content", [True, False])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    checkpoint: Path, content: bool
) -> None:
    """It would replace them, and rotation would delete them."""
    newer = fake_checkpoint(checkpoint.parent, 6)
    for folder in (checkpoint, newer):
        (folder / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(ConfigError) as raised:
        resume_checkpoint(checkpoint.parent, resuming(True), content)
    message = str(raised.value)
    for folder in (checkpoint, newer):
        assert f"{folder}: model.safetensors has 3 bytes instead of 11" in message
    for way in ("Restore one", "resume: PATH", "another project_name", "--overwrite"):
        assert way in message
    (checkpoint.parent / "finished.json").write_text("{}")
    assert resume_checkpoint(checkpoint.parent, resuming(True), content)[0] is None, "the ranks read it"


def test_a_damaged_named_checkpoint_is_refused_before_newer_ones_are_renamed(checkpoint: Path) -> None:
    run = checkpoint.parent
    claim(run, resuming(True))
    fake_checkpoint(run, 10)
    (checkpoint / WEIGHTS).write_bytes(b"THE WEIGHTS")
    before = names(run)
    with pytest.raises(ConfigError, match="has changed since it was written"):
        claim(run, resuming(str(checkpoint)))
    assert names(run) == before


def test_a_set_aside_checkpoint_can_be_renamed_back(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/checkpoints.md says so. It is still of the run: --overwrite removes it."""
    run = checkpoint.parent
    newer = fake_checkpoint(run, 10)
    claim(run, resuming(str(checkpoint)))
    aside = run / "set-aside-1-checkpoint-10"
    assert f"{newer} is newer than {checkpoint}; it is kept as {aside.name}" in capsys.readouterr().out
    aside.rename(newer)
    assert resume_checkpoint(run, resuming(True)) == (newer, [])
    claim(run, TrainConfig(overwrite=True))
    assert not newer.exists()


def test_a_named_checkpoint_may_belong_to_another_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert resume_checkpoint(tmp_path / "other", resuming(str(checkpoint))) == (checkpoint, [])


def test_a_named_checkpoint_must_verify(checkpoint: Path) -> None:
    older = fake_checkpoint(checkpoint.parent, 3)
    (checkpoint / WEIGHTS).write_bytes(b"THE WEIGHTS")
    with pytest.raises(ConfigError) as error:
        resume_checkpoint(checkpoint.parent, resuming(str(checkpoint)))
    assert str(error.value) == (
        f"resume: {checkpoint} cannot be used: model.safetensors has changed since it was written. "
        "resume: true uses the newest checkpoint that verifies."
    )
    assert resume_checkpoint(checkpoint.parent, resuming(str(older))) == (older, [])


def test_a_folder_with_another_name_is_not_a_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a checkpoint\. Give a folder checkpoint-N of a run"):
        resume_checkpoint(checkpoint.parent, resuming(str(checkpoint.parent)))


def test_a_missing_checkpoint_is_not_reported_as_incomplete(checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resume_checkpoint(checkpoint.parent, resuming(str(checkpoint.parent / "checkpoint-500")))
    assert "save did not finish" not in str(error.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != WRITTEN)


def test_checkpoints_after_the_named_one_are_renamed(tmp_path: Path) -> None:
    for step in (3, 5, 10):
        fake_checkpoint(tmp_path, step)
    set_aside_newer_checkpoints(tmp_path, resuming(str(tmp_path / "checkpoint-5")))
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5", "set-aside-1-checkpoint-10"]
    assert why_unusable(tmp_path / "set-aside-1-checkpoint-10", content=True) is None
    fake_checkpoint(tmp_path, 10)
    set_aside_newer_checkpoints(tmp_path, resuming(str(tmp_path / "checkpoint-5")))
    assert names(tmp_path)[2:] == ["set-aside-1-checkpoint-10", "set-aside-2-checkpoint-10"]


@pytest.mark.parametrize("resume", [True, False, "elsewhere/checkpoint-1"])
def test_in_other_cases_no_checkpoint_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool | str
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_checkpoint(Path("elsewhere"), 1)
    fake_checkpoint(Path("run"), 10)
    set_aside_newer_checkpoints(Path("run"), resuming(resume))
    assert names(tmp_path / "run") == ["checkpoint-10"]
