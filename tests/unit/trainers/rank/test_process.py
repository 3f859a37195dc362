"""How a rank ends with an error: its exit code, its note, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from messages import CUDA, GLOO

from trainers.config.errors import DISK_FAILED, NOT_FINITE, OUT_OF_MEMORY, PEER_LOST, RUN_FAILED
from trainers.rank import process
from trainers.rank.failures import BatchTooLarge, NotFinite


def rank_that_raises(error: Exception) -> int:
    def fail() -> int:
        raise error

    return process.run_rank(fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [(NotFinite("planted"), NOT_FINITE), (RuntimeError(GLOO), PEER_LOST), (KeyError("planted"), RUN_FAILED)],
)
def test_a_rank_exits_with_the_code_of_its_error(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHALANX_LOG_DIR", raising=False)
    monkeypatch.setattr(process.stop, "listen", lambda: None)
    assert rank_that_raises(error) == code


def test_a_rank_that_cannot_write_its_note_exits_with_the_code_of_its_error(tmp_path: Path) -> None:
    """The disk is full. Of all errors, this one is the most likely to leave no note."""
    (tmp_path / "rank-0.error.json").symlink_to("/dev/full")
    script = """
import errno, sys
from trainers.rank.process import run_rank

def fail():
    raise OSError(errno.ENOSPC, "No space left on device")

sys.exit(run_rank(fail))
"""
    environ = {**os.environ, "PHALANX_LOG_DIR": str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=False)
    assert done.returncode == DISK_FAILED


def test_the_traceback_and_the_note_of_a_rank_hide_secrets(tmp_path: Path) -> None:
    script = """
import sys
from trainers.rank.process import run_rank

def fail():
    try:
        raise OSError("cannot connect to http://me:horse@proxy")
    except OSError as error:
        raise RuntimeError("no answer to https://hub/me?token=horse, with hf_horseHorseHorseHorse") from error

sys.exit(run_rank(fail))
"""
    environ = {**os.environ, "PHALANX_LOG_DIR": str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=False)
    assert done.returncode == RUN_FAILED
    log, note = ((tmp_path / name).read_text() for name in ("rank-0.log", "rank-0.error.json"))
    assert log.count("(hidden)") == 3 and "OSError: cannot connect to http://(hidden)@proxy" in log
    assert "no answer to https://hub/me?token=(hidden) with (hidden)" in note
    assert "horse" not in (log + note).lower()


def test_a_rank_started_by_hand_recommends_the_launchers_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PHALANX_LOG_DIR", raising=False)
    assert rank_that_raises(BatchTooLarge(CUDA)) == OUT_OF_MEMORY
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "error: rank 0 ran out of memory. Lower batch_size and raise gradient_accumulation"
    )
    assert "phalanx train config.yaml --auto-find-batch-size" in last
    assert rank_that_raises(RuntimeError(CUDA)) == OUT_OF_MEMORY  # for example while it loaded the model
    assert "Lower batch_size" not in capsys.readouterr().err
    assert rank_that_raises(RuntimeError("planted")) == RUN_FAILED
