"""metrics.jsonl: strict JSON, the names of metrics, and what continues over a resume."""

from __future__ import annotations

import math
from pathlib import Path

from tracked import report_logs


def test_nan_and_infinity_are_kept_over_a_resume(tmp_path: Path) -> None:
    report_logs(tmp_path, None, {"loss": math.nan}, {"loss": 1.0})
    lines = report_logs(tmp_path, None, {"loss": -math.inf}, resumed_step=1)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, "NaN"), (2, "-Infinity")]


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
