"""A resume in one process: what it refuses, what it keeps of the training before, and its totals."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from inprocess import PEFT, build, train
from safetensors.torch import load_file, save_file

from trainers.config.errors import ConfigError, Unfinished
from trainers.loop import finish, record
from trainers.storage import run_files
from trainers.storage.manifest import read_manifest
from trainers.storage.resumed import read_record

SAVES = {"trainer": "sft", "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "batch_size": 2}


def change_weights(model: Path) -> None:
    """Train the model further: the same names, shapes and sizes, and other values."""
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, model / "model.safetensors")


@pytest.mark.parametrize("logging_steps", [1, 5, 100])
def test_a_resumed_run_has_the_totals_of_an_undisturbed_one(tmp_path, tiny_model, logging_steps, caplog):
    values = {**SAVES, "save_total_limit": 3, "lr": 1e-2, "logging_steps": logging_steps}
    values |= {"max_steps": -1, "epochs": 6}  # one step each
    complete = train(build(tmp_path, tiny_model, **values)).trainer.state.log_history
    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = build(tmp_path, tiny_model, resume=str(checkpoint), **values)
    assert resumed.trainer.find_checkpoint() == (checkpoint, [])
    again = train(resumed, checkpoint).trainer.state.log_history
    assert [entry["step"] for entry in again] == [entry["step"] for entry in complete]
    for entry, expected in zip(again, complete, strict=True):
        names = {"loss", "train_loss"} & expected.keys()
        assert {name: entry.get(name) for name in names} == pytest.approx({n: expected[n] for n in names})
    assert "there is already one" not in caplog.text  # transformers, of a second sampler
    last = again[-1]
    assert last["train_runtime"] > read_manifest(checkpoint).totals["seconds"] > 0
    assert last["train_steps_per_second"] == pytest.approx(6 / last["train_runtime"], rel=0.01)


def test_a_resume_at_the_last_step_has_the_loss_of_the_run(tmp_path, tiny_model):
    complete = train(build(tmp_path, tiny_model, **SAVES)).trainer.state.log_history[-1]
    resumed = build(tmp_path, tiny_model, resume=True, **SAVES)
    again = train(resumed, tmp_path / "run" / "checkpoint-6").trainer.state.log_history[-1]
    assert again["train_loss"] == pytest.approx(complete["train_loss"])


@pytest.fixture
def own_model(tmp_path, tiny_model) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lr": 1e-3}, r"^lr: it is 0\.001, but 3e-05 in the training of .*checkpoint-6"),
        (
            {"max_steps": 4},
            r"^max_steps: the run would end at step 4, but .*checkpoint-6 is trained to step 6",
        ),
        ({"max_steps": -1, "epochs": 1}, r"^epochs: the run would end at step "),
        ({"rows": [{"prompt": "a", "completion": "b", "text": "another row"}]}, r"^data\.path: the rows"),
        ("weights", r"^base_model: it is not the model of the training of .*checkpoint-6"),
    ],
    ids=str,
)
def test_a_rank_refuses_what_a_resume_cannot_change(tmp_path, own_model, change, why):
    train(build(tmp_path, own_model, **SAVES))
    if change == "weights":
        change_weights(own_model)
        change = {}
    resumed = build(tmp_path, own_model, **{**SAVES, "resume": True, **change})
    with pytest.raises(ConfigError, match=why):
        resumed.trainer.find_checkpoint()


def test_the_model_and_the_data_may_be_in_another_place(tmp_path, own_model):
    train(build(tmp_path, own_model, **SAVES))
    moved = shutil.move(own_model, tmp_path / "moved")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    values = {**SAVES, "data_path": str(tmp_path / "copy"), "max_steps": 8, "save_steps": 4}
    resumed = build(tmp_path, moved, resume=True, **values)
    assert resumed.trainer.find_checkpoint() == (tmp_path / "run" / "checkpoint-6", [])


def finished(built):
    """Train and save, as life.py does."""
    folder = built.context.folder
    run_files.begin(folder, of_earlier_version=False)
    facts = record.record_start(built.trainer, built.context, built.settings, None)
    train(built)
    return finish.save_final_model(built.trainer, built.context), facts


def test_a_finished_run_keeps_the_record_of_its_training(tmp_path, own_model, capsys):
    ending, facts = finished(build(tmp_path, own_model, **{**SAVES, "max_steps": 2}))
    folder = tmp_path / "run"
    again = build(
        tmp_path, own_model, **{**SAVES, "max_steps": 2, "resume": True, "save_steps": 1, "log": "none"}
    )
    assert record.ended_before(again.trainer, folder) == ending
    kept = record.record_start(again.trainer, again.context, again.settings, ending)
    assert "note: save_steps: has no effect, since the run is trained" in capsys.readouterr().out
    assert kept == read_record(folder) and again.context.config.save_steps == 2
    assert kept["config"]["resume"]["value"] is True
    assert kept["id"] and kept["id"] == read_manifest(folder / "checkpoint-2").run
    changed = {name for name in kept["config"] if kept["config"][name] != facts["config"][name]}
    assert changed == {"resume", "log"}
    assert {name: kept[name] for name in facts if name != "config"} == {
        name: value for name, value in facts.items() if name != "config"
    }
    finish.finish(again.context, kept, ending)
    card = (folder / "README.md").read_text()
    assert "save_steps: 2" in card and "save_steps: 1" not in card


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        ({}, True),
        ({"max_steps": 3}, False),
        ({"batch_size": 1}, True),
        ({"epochs": 3}, False),
    ],
    ids=str,
)
def test_a_finished_run_continues_only_if_its_length_changes(tmp_path, tiny_model, change, ended):
    """With other batches an epoch has another number of steps."""
    values = {**SAVES, "max_steps": -1, "epochs": 2, "save_strategy": "no"}
    ending, _ = finished(build(tmp_path, tiny_model, **values))
    again = build(tmp_path, tiny_model, **{**values, "resume": True, **change})
    assert record.ended_before(again.trainer, tmp_path / "run") == (ending if ended else None)


@pytest.mark.parametrize("change", ["config", "length", "weights"])
def test_a_finished_run_refuses_what_a_resume_cannot_change(tmp_path, own_model, change):
    finished(build(tmp_path, own_model, **{**SAVES, "max_steps": 2}))
    if change == "weights":
        change_weights(own_model)
    values = {"config": {"lr": 1e-3}, "length": {"max_steps": 1}}.get(change, {})
    again = build(tmp_path, own_model, **{**SAVES, "max_steps": 2, "resume": True, **values})
    why = {"config": "^lr: ", "length": "^max_steps: the run would end at step 1", "weights": "^base_model: "}
    with pytest.raises(ConfigError, match=why[change]):
        record.ended_before(again.trainer, tmp_path / "run")


def test_an_adapter_is_not_merged_into_a_base_that_has_changed(tmp_path, own_model):
    """The base changes while the run trains, so no resume notices it."""
    built = build(tmp_path, own_model, trainer="sft", merge_adapter=True, **PEFT)
    ending, facts = finished(built)
    change_weights(own_model)
    with pytest.raises(Unfinished, match="merge failed: base_model: it is not the model of the training of"):
        finish.finish(built.context, facts, ending)
    assert (tmp_path / "run" / "adapter_config.json").exists() and ending.done == []


def test_all_ranks_compare_their_base_weights(tmp_path, own_model):
    built = build(tmp_path, own_model, **SAVES)
    facts = record.of_all_ranks(built.trainer, built.settings, built.context)
    assert facts.items() >= asdict(built.trainer.inputs)["weights"].items()
