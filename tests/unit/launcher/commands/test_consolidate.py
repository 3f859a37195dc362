"""`phalanx consolidate` refuses what is not a run or a checkpoint, before torch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import main


@pytest.mark.parametrize("name", ["no-such-folder", "run/checkpoint-5"])
def test_a_folder_that_does_not_exist_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["consolidate", name]) == 2
    assert (
        f"{name}: there is no checkpoint that verifies. The folder does not exist." in capsys.readouterr().err
    )


def test_a_folder_without_a_checkpoint_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert main(["consolidate", "empty"]) == 2
    assert "empty: there is no checkpoint that verifies. Give a run's folder" in capsys.readouterr().err
