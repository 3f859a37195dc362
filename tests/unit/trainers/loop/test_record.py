"""What a resume of a finished run looks at before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import fake_checkpoint

from trainers.loop.record import _read_end, _verify
from trainers.storage.ending import Ending, read_ending


def end_of(run: Path) -> Ending:
    ending = read_ending(run)
    assert ending is not None
    return ending


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)


def test_a_finished_run_whose_files_verify_trains_nothing(saved_run: Path) -> None:
    assert _verify(saved_run, end_of(saved_run)) == (True, "")


def test_a_damaged_final_model_is_saved_again_from_the_checkpoint_of_its_step(
    saved_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(saved_run / "model.safetensors")
    copy = fake_checkpoint(saved_run, 4)
    assert _verify(saved_run, end_of(saved_run)) == (False, "")
    assert (
        "warning: the final model is damaged: model.safetensors has changed since it was written. It is "
        f"saved again, from {copy}." in capsys.readouterr().err
    )


def test_a_damaged_final_model_without_a_copy_is_refused(saved_run: Path) -> None:
    """Else an older checkpoint, or the first step, would begin a training that nobody asked for."""
    flip(saved_run / "model.safetensors")
    flip(fake_checkpoint(saved_run, 4) / "model.safetensors")
    fake_checkpoint(saved_run, 3)
    verifies, why = _verify(saved_run, end_of(saved_run))
    assert not verifies and "the final model is damaged: model.safetensors has changed" in why
    assert f"remove {saved_run / 'finished.json'}" in why


def test_a_damaged_record_of_the_end_is_refused(saved_run: Path) -> None:
    (saved_run / "finished.json").write_text("{}")
    ending, _, why = _read_end(saved_run)
    assert ending is None and "finished.json is damaged" in why
