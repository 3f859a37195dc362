"""metrics.jsonl: strict JSON, the names of metrics, and what continues over a resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tracked import report_logs

from trainers.storage.metrics_log import read_metrics


def test_nan_and_infinity_are_kept_over_a_resume(tmp_path: Path) -> None:
    report_logs(tmp_path, None, {"loss": math.nan}, {"loss": 1.0})
    lines = report_logs(tmp_path, None, {"loss": -math.inf}, resumed_step=1)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, "NaN"), (2, "-Infinity")]


BAD = [b"{", b"[]", b"7", b"\xff\xfe", b"{}", b'{"step": "2", "loss": 1}', b'{"step": 2, "loss": 1}}', b""]


@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_line_is_left_out_with_one_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bytes
) -> None:
    report_logs(tmp_path, None, {"loss": 2.0, "num_input_tokens_seen": 100})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(bad + b"\n" + path.read_bytes() + bad)
    capsys.readouterr()
    lines = report_logs(tmp_path, None, {"loss": 1.0}, resumed_step=1)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.0)]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and f"{path}: 1 line cannot be read" in notes[0]


def test_a_folder_in_the_place_of_the_log_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert read_metrics(tmp_path) == [] and "cannot be read (Is a directory)" in capsys.readouterr().out


def test_metrics_of_the_test_split_are_named_test(tmp_path: Path) -> None:
    logs = {"test_loss": 2.0, "test_runtime": 1.0, "eval_mean_token_accuracy": 0.5}
    [line] = report_logs(tmp_path, None, logs)
    assert set(line) == {"step", "epoch", "test_loss", "test_runtime", "test_mean_token_accuracy"}


def test_the_count_of_tokens_continues_over_a_resume(tmp_path: Path) -> None:
    report_logs(tmp_path, None, {"loss": 2.0, "num_input_tokens_seen": 100})
    trl = report_logs(tmp_path, None, {"loss": 1.0, "num_tokens": 50.0}, resumed_step=1)
    assert [line["tokens"] for line in trl] == [100, 150]
    transformers = report_logs(tmp_path, None, {"loss": 1.0, "num_input_tokens_seen": 175}, resumed_step=1)
    assert [line["tokens"] for line in transformers] == [100, 175]
    assert not any("num_input_tokens_seen" in line for line in transformers)
