"""`phalanx show`: what it prints, as text and as JSON. It writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import listing, run_command, show

from launcher.config import load_run
from launcher.slurm.request import TRAIN
from trainers.config.schema import TrainConfig


def test_show_prints_everything_and_writes_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(config.parent.parent)
    assert run_command(["show", "c.yaml", "--num-processes", "2"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert listing(config.parent.parent) == before
    titles = [line for line in out.splitlines() if line.startswith("# ")]
    here = config.parent / "run" / "launch" / "attempt-1"
    assert titles == [
        "# effective config", "# notes", "# backend", f"# {here}/accelerate.yaml", "# command",
        "# the same by hand", "# on SLURM", "# shipped files",
    ]  # fmt: skip
    for words in (
        "c.yaml:7",
        "flag --num-processes",
        "default",
        "derived: ",
        "ddp: the model fits",
        "2 ranks on 1 machine, cpu",
    ):
        assert words in out


def test_the_path_of_the_data_is_left_out_if_a_mix_takes_its_place(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data_path" in show(["c.yaml"], monkeypatch, capsys)["config"]
    config.write_text(config.read_text().replace("  path: data\n", "  mix: [{path: data}]\n"))
    found = show(["c.yaml"], monkeypatch, capsys)["config"]
    assert found["mix"]["value"][0]["path"] == "data"
    assert set(found) == set(TrainConfig.model_fields) - {"token", "data_path"}


def test_show_names_the_next_attempt(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        (config.parent / "run" / "launch" / f"attempt-{number}").mkdir(parents=True)
        (config.parent / "run" / "launch" / f"attempt-{number}" / "command.txt").touch()
    assert show(["c.yaml", "--overwrite"], monkeypatch, capsys)["folder"].endswith("run/launch/attempt-3")


def test_json_and_text_agree(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ["--main-process-port", "23456"]
    plan = show(["c.yaml", *ports], monkeypatch, capsys)
    assert run_command(["show", "c.yaml", *ports], monkeypatch) == 0
    out = capsys.readouterr().out
    assert set(plan["config"]) == set(TrainConfig.model_fields) - {"token"}
    for name, entry in {**plan["config"], **plan["launch"]}.items():
        value = entry["value"] if isinstance(entry["value"], str) else json.dumps(entry["value"])
        assert any(
            line.split() == [name, *value.split(), *entry["source"].split()] for line in out.splitlines()
        ), name
    assert " ".join(plan["command"]) in out


def test_the_shipped_files_that_show_names_exist(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = show(["c.yaml"], monkeypatch, capsys)
    assert all(Path(path).is_dir() for path in plan["static_files"].values())
    assert Path(plan["by_hand"][plan["by_hand"].index("--config_file") + 1]).is_file()


def test_an_effective_config_can_be_shown(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainers.config.file import effective_text

    Path("config.json").write_text(effective_text(load_run(Path("c.yaml"), {}).settings))
    first, second = show(["c.yaml"], monkeypatch, capsys), show(["config.json"], monkeypatch, capsys)
    assert (first["config"], first["notes"]) == (second["config"], second["notes"])


def test_show_prints_the_command_and_submits_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "slurm: {nodes: 2, job_name: mine}\n")
    before = listing(config.parent.parent)
    assert run_command(["show", "c.yaml"], monkeypatch) == 0
    assert f"sbatch --nodes=2 --job-name=mine {TRAIN} c.yaml" in capsys.readouterr().out
    plan = show(["c.yaml"], monkeypatch, capsys)
    assert plan["sbatch"] == ["sbatch", "--nodes=2", "--job-name=mine", str(TRAIN), "c.yaml"]
    assert listing(config.parent.parent) == before
