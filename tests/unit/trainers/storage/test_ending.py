"""finished.json: how a run ended, as long as its model opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.storage.ending import MERGE, Ending, read_ending
from trainers.storage.run_folder import FINISHED

ENDING = Ending(step=20, metrics={"loss": 1.5}, model_step=15, done=[MERGE])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_an_ending_is_read_as_it_was_written(saved_run: Path) -> None:
    assert read_ending(saved_run) is None
    ENDING.write(saved_run)
    assert read_ending(saved_run) == ENDING


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda run: cut(run / "model.safetensors"), "model.safetensors cannot be opened"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda run: (run / FINISHED).write_text("{"), "Expecting property name"),
        (lambda run: (run / FINISHED).write_text("[]"), ""),
        (lambda run: (run / FINISHED).write_text('{"step": 20}'), "missing"),
    ],
)
def test_without_its_model_a_run_has_not_ended(
    saved_run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], why: str
) -> None:
    ENDING.write(saved_run)
    damage(saved_run)
    assert read_ending(saved_run) is None
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {saved_run / FINISHED} is not used: ") and why in line
