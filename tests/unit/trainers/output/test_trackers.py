"""Trackers: real offline files of wandb and TensorBoard are read back. A failing tracker stops no run."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracked import (
    events,
    forget_wandb,
    items,
    report_logs,
    scalars,
    wandb_files,
    wandb_history,
    wandb_records,
    wandb_run,
)

from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.output.trackers import open_tracker

CANARY = "c4na3y0123456789"
KEY = (CANARY * 3)[:40]  # as long as a key of wandb
LOGS = [
    (1, {"epoch": 0.1, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-4, "tokens": 512}),
    (2, {"epoch": 0.2, "loss": 2.25, "rewards/margins": -0.5, "tokens": 1024}),
    (2, {"epoch": 0.2, "eval_loss": 2.0, "eval_runtime": 3.5}),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's folder on a machine without settings of a tracker, and a fresh wandb."""
    for name in list(os.environ):
        if name.startswith("WANDB") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("NETRC", "TENSORBOARD_LOGGING_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    forget_wandb()
    (tmp_path / "my-run").mkdir()
    yield Path("my-run")
    forget_wandb()
    for name in set(os.environ) - set(before):
        del os.environ[name]  # wandb sets variables for its service


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, and which no other process gets."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def start(folder: Path, resumed_step: int = 0, **values: Any) -> Any:
    if values["log"] != "none":
        pytest.importorskip(values["log"])
    config = TrainConfig(project_name=str(folder), **values)
    return open_tracker(config, folder, Settings(config, {}).public(), resumed_step)


def track(folder: Path, logs: Any = LOGS, resumed_step: int = 0, **values: Any) -> None:
    tracker = start(folder, resumed_step, **values)
    for step, record in logs:
        tracker.log(step, record)
    tracker.finish()


def test_log_none_opens_no_tracker(folder: Path) -> None:
    assert start(folder, log="none") is None
    assert list(folder.iterdir()) == []


def test_wandb_gets_every_metric_under_its_own_name(folder: Path) -> None:
    track(folder, log="wandb")
    [path] = wandb_files(folder)
    assert wandb_history(path) == [{"step": step, **values} for step, values in LOGS]
    metrics = [record.metric for record in wandb_records(path) if record.HasField("metric")]
    assert [(m.glob_name, m.step_metric) for m in metrics if m.glob_name] == [("*", "step")]


def test_wandb_gets_the_effective_config(folder: Path) -> None:
    track(folder, log="wandb", lr=0.5, block_size=[512, 128])
    config = items(wandb_run(wandb_files(folder)[0]).config.update)
    config.pop("_wandb")
    expected = TrainConfig(project_name=str(folder), log="wandb", lr=0.5, block_size=[512, 128])
    assert config == expected.model_dump(mode="json", exclude={"token"})


def test_wandb_is_named_by_the_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_NAME", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "environment")
    track(folder, log="wandb", run_name="name", wandb_project="project", wandb_entity="entity")
    run = wandb_run(wandb_files(folder)[0])
    assert (run.display_name, run.project, run.entity) == ("name", "project", "entity")


def test_without_names_in_the_config_wandb_takes_those_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NAME", "PROJECT", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    track(folder, log="wandb")
    run = wandb_run(wandb_files(folder)[0])
    assert (run.display_name, run.project, run.entity) == ("name", "project", "entity")


def test_without_other_names_wandb_takes_that_of_the_folder(folder: Path) -> None:
    track(folder, log="wandb")
    run = wandb_run(wandb_files(folder)[0])
    assert (run.display_name, run.project, run.entity) == ("my-run", "my-run", "")


def test_wandb_uses_the_users_settings_and_prints_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Path.home() / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nentity = team\nproject = ours\nmode = offline\n")
    track(folder, log="wandb")
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and "offline (as configured)" in out and err == ""
    run = wandb_run(wandb_files(folder)[0])
    assert (run.project, run.entity) == ("ours", "team")


def test_wandb_continues_the_same_run_after_a_restart(folder: Path) -> None:
    track(folder, log="wandb")
    first = wandb_run(wandb_files(folder)[0])
    (folder / "wandb").rename(folder / "earlier")  # wandb distinguishes starts by their second
    again = [(2, {"loss": 2.25}), (3, {"loss": 1.0})]
    track(folder, again, 1, log="wandb", lr=0.5)
    [path] = wandb_files(folder)
    second = wandb_run(path)
    assert second.run_id == first.run_id and second.resume
    assert items(second.config.update)["lr"] == 0.5
    assert wandb_history(path) == [{"step": step, **values} for step, values in again]


def test_wandb_takes_the_environments_id_for_a_new_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    track(folder, log="wandb")
    assert wandb_run(wandb_files(folder)[0]).run_id == "chosen"


def test_wandb_does_not_change_the_random_numbers_of_the_training(folder: Path) -> None:
    import random

    random.seed(0)
    state = random.getstate()
    track(folder, log="wandb")
    assert random.getstate() == state


def sync_command(out: str) -> str:
    [line] = out.splitlines()
    assert line.startswith("wandb: offline (")
    return line.partition("upload later: ")[2]


def test_wandb_without_a_key_is_offline_and_prints_how_to_upload(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    track(folder, log="wandb")
    captured = capfd.readouterr()
    assert "(no API key)" in captured.out and captured.err == ""
    wandb, sync, pattern = shlex.split(sync_command(captured.out))
    assert (wandb, sync) == ("wandb", "sync")
    assert list(Path("/").glob(pattern.lstrip("/"))) == [wandb_files(folder.resolve())[0].parent]


@pytest.mark.parametrize("place", ["environment", "netrc"])
def test_wandb_without_its_server_is_offline(
    folder: Path,
    closed_port: int,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        netrc = Path.home() / ".netrc"
        netrc.write_text(f"machine 127.0.0.1:{closed_port}\n  login user\n  password {KEY}\n")
        netrc.chmod(0o600)
    track(folder, log="wandb")
    out, err = capfd.readouterr()
    assert f"(no connection to 127.0.0.1:{closed_port})" in out and err == ""
    assert len(wandb_history(wandb_files(folder)[0])) == len(LOGS)


def test_wandb_is_offline_if_the_user_sets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(folder, log="wandb")
    assert "offline-run-" in sync_command(capfd.readouterr().out)


def test_wandb_is_disabled_if_the_user_sets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(folder, log="wandb")
    assert wandb_files(folder) == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("log", ["wandb", "tensorboard"])
def test_no_secret_is_written_to_a_file(
    folder: Path, tmp_path: Path, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SLURM_JWT", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", [sys.argv[0], "--token", KEY])
    track(folder, log=log, token=KEY)
    if log == "wandb":
        assert wandb_history(wandb_files(folder)[0])  # everything is written
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" or ".tfevents." in path.name for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_tensorboard_gets_every_number_under_its_own_name(folder: Path) -> None:
    track(folder, [*LOGS, (3, {"loss": 1.5, "note": "a word"})], log="tensorboard")
    assert scalars(folder / "runs") == {
        "epoch": [(1, pytest.approx(0.1)), (2, pytest.approx(0.2)), (2, pytest.approx(0.2))],
        "loss": [(1, 2.5), (2, 2.25), (3, 1.5)],
        "grad_norm": [(1, 1.25)],
        "learning_rate": [(1, pytest.approx(1e-4))],
        "tokens": [(1, 512), (2, 1024)],
        "rewards/margins": [(2, -0.5)],
        "eval_loss": [(2, 2.0)],
        "eval_runtime": [(2, 3.5)],
    }


def test_tensorboard_gets_the_effective_config(folder: Path) -> None:
    track(folder, log="tensorboard", lr=0.5)
    [event] = events(folder / "runs").Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode().removeprefix("```json").removesuffix("```")
    config = TrainConfig(project_name=str(folder), log="tensorboard", lr=0.5)
    assert json.loads(text) == config.model_dump(mode="json", exclude={"token"})


@pytest.mark.parametrize("resumed_step", [0, 1])
def test_tensorboard_shows_no_step_twice_after_a_restart(folder: Path, resumed_step: int) -> None:
    track(folder, [(step, {"loss": 4.0}) for step in (1, 2, 3)], log="tensorboard")
    steps = range(resumed_step + 1, 5)
    track(folder, [(step, {"loss": 2.0}) for step in steps], resumed_step, log="tensorboard")
    expected = [(step, 4.0 if step <= resumed_step else 2.0) for step in (1, 2, 3, 4)]
    assert scalars(folder / "runs")["loss"] == expected


def test_tensorboard_uses_the_folder_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    track(folder, log="tensorboard")
    assert "loss" in scalars(tmp_path / "elsewhere") and not (folder / "runs").exists()


def fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("no such server\nand a long story")


@pytest.mark.parametrize("where", ["init", "Run.log", "Run.finish"])
def test_a_failing_tracker_is_reported_once_and_the_run_continues(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(f"wandb.{where}", fail)
    tracker = start(folder, log="wandb")
    lines = report_logs(folder, tracker, {"loss": 2.0}, {"loss": 1.0})
    tracker.finish(1)
    tracker.finish(1)
    monkeypatch.undo()
    assert [line["loss"] for line in lines] == [2.0, 1.0]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: tracker wandb failed: no such server; the run continues without it"]


def test_the_tracker_gets_what_metrics_jsonl_gets(folder: Path) -> None:
    tracker = start(folder, log="wandb")
    logs = [{"loss": 2.0, "num_tokens": 512.0}, {"eval_loss": 1.5}, {"loss": math.nan, "grad_norm": math.inf}]
    lines = report_logs(folder, tracker, *logs)
    tracker.finish()
    rows = wandb_history(wandb_files(folder)[0])
    assert len(rows) == 3 and rows[0]["tokens"] == 512
    assert math.isnan(rows[2].pop("loss")) and lines[2].pop("loss") == "NaN"
    assert rows[2].pop("grad_norm") == math.inf and lines[2].pop("grad_norm") == "Infinity"
    assert rows == lines
