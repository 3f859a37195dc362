"""Saving and resuming in one process: the files of a checkpoint, when it is written, which ones are kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import fake_checkpoint
from inprocess import build, train
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, build_architecture

from trainers.checkpoint import saving
from trainers.checkpoint.readable import why_unreadable
from trainers.config.errors import ConfigError
from trainers.loop import step_boundary
from trainers.rank.signals import Stop
from trainers.storage.manifest import Layout, checkpoint_folders, entry_of, read_manifest, why_unusable


def names(work: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(work / "run")]


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "batch_size": 2}


def test_the_manifest_lists_every_file_of_a_checkpoint(tmp_path, tiny_model):
    train(build(tmp_path, tiny_model, trainer="sft", **SAVES))
    folder = tmp_path / "run" / "checkpoint-6"
    manifest = read_manifest(folder)
    assert why_unusable(folder, content=True) is None
    assert {entry.path for entry in manifest.files} == {
        path.name for path in folder.iterdir() if path.name != "manifest.json"
    }
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < {
        entry.path for entry in manifest.files
    }
    assert manifest.step == 6 and manifest.layout.backend == "none" and manifest.layout.global_batch == 2
    assert manifest.versions["torch"] == importlib.metadata.version("torch")
    assert manifest.position["evaluation_due"] is False and manifest.position["data_seed"] == 42
    assert not (tmp_path / "run" / "saving").exists()


def test_the_pickles_of_a_checkpoint_open_with_weights_only(tmp_path, tiny_model):
    """The exception is numpy's random state, which transformers lists as safe."""
    from transformers.trainer_pt_utils import safe_globals

    train(build(tmp_path, tiny_model, trainer="sft", **SAVES))
    pickles = [
        path for path in (tmp_path / "run" / "checkpoint-6").iterdir() if path.suffix in (".pt", ".pth")
    ]
    assert len(pickles) == 3
    with safe_globals():
        for path in pickles:
            torch.load(path, weights_only=True)
    assert not list((tmp_path / "run").glob("checkpoint-*/training_args.bin"))


def test_the_newest_checkpoints_are_kept(tmp_path, tiny_model):
    train(build(tmp_path, tiny_model, trainer="sft", save_total_limit=2, **SAVES))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_the_best_checkpoint_is_kept_in_addition_to_the_newest(tmp_path, tiny_model, monkeypatch):
    built = build(
        tmp_path, tiny_model, trainer="sft", valid_fraction=0.4, eval_strategy="steps", eval_steps=2, **SAVES
    )
    scored(built, monkeypatch, 0.1, 0.5, 0.9)
    train(built)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    best = tmp_path / "run" / "checkpoint-2"
    assert built.trainer.state.best_model_checkpoint == str(best)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_save_minutes_saves_at_any_step(tmp_path, tiny_model, monkeypatch):
    minutes = iter(range(0, 1000, 60))  # a minute passes between two calls
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: next(minutes))})
    monkeypatch.setattr(step_boundary, "time", clock)
    values = {**SAVES, "save_strategy": "no", "save_minutes": 3, "save_total_limit": 9}
    values.pop("save_steps")
    train(build(tmp_path, tiny_model, trainer="sft", **values))
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path, tiny_model):
    train(build(tmp_path, tiny_model, trainer="sft", save_total_limit=3, **SAVES))
    folder = tmp_path / "run" / "checkpoint-6"
    (folder / "optimizer.pt").write_bytes(b"damaged")
    again = build(tmp_path, tiny_model, trainer="sft", save_total_limit=3, resume=True, **SAVES)
    found, skipped = again.trainer.find_checkpoint()
    assert found == tmp_path / "run" / "checkpoint-4"
    size = skipped[0].split()[-1]
    assert skipped == [f"skipped {folder}: optimizer.pt has 7 bytes instead of {size}"]
    train(again, found)
    assert why_unusable(folder, content=True) is None


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, tmp_path_factory, tiny_model) -> Path:
    return build_architecture(request.param, tiny_model, tmp_path_factory.mktemp("architecture") / "model")


@pytest.mark.parametrize("trainer", ["sft", "reward"])
def test_a_resume_and_the_best_model_have_every_weight_of_the_checkpoint(
    tmp_path, architecture, trainer, caplog
):
    values = {"trainer": trainer, "save_total_limit": 9, "lr": 1e-2, **SAVES, "max_steps": 4}
    trained = train(build(tmp_path, architecture, **values)).trainer
    expected = {name: value.clone() for name, value in trained.model.state_dict().items()}
    folder = tmp_path / "run" / "checkpoint-4"
    resumed = build(tmp_path, architecture, resume=str(folder), **values).trainer
    resumed._load_from_checkpoint(str(folder))
    best = build(tmp_path, architecture, **values).trainer
    best.state.log_history = [{"step": 4, "eval_loss": 1.0}]
    best._load_best_model()
    for model in (resumed.model, best.model):
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert "missing" not in caplog.text


EVALUATES = {"valid_fraction": 0.4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


def scored(built, monkeypatch, *scores: float):
    """Let the evaluations give these losses."""
    evaluate, losses = built.trainer.evaluate, iter(scores)
    monkeypatch.setattr(
        built.trainer, "evaluate", lambda *a, **k: evaluate(*a, **k) | {"eval_loss": next(losses)}
    )
    log = built.trainer.log

    def logged(entry, *rest):
        log(entry, *rest)
        history = built.trainer.state.log_history
        if "eval_loss" in history[-1]:
            history[-1]["eval_loss"] = scores[sum("eval_loss" in entry for entry in history) - 1]

    monkeypatch.setattr(built.trainer, "log", logged)
    return built


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_the_best_model_is_that_of_the_best_checkpoint_that_verifies(
    tmp_path, tiny_model, monkeypatch, capsys, damage
):
    built = build(tmp_path, tiny_model, trainer="sft", save_total_limit=3, **EVALUATES, **SAVES)
    scored(built, monkeypatch, 0.1, 0.5, 0.9)
    best, second = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    finalize = built.trainer._finalize_training

    def damaged(*arguments, **named):
        built.trainer.conclude()
        if damage == "gone":
            shutil.rmtree(best)
        else:
            flip_a_bit(best / "model.safetensors")
        return finalize(*arguments, **named)

    monkeypatch.setattr(built.trainer, "_finalize_training", damaged)
    train(built)
    assert built.trainer.model_step == 4 and built.trainer.state.best_model_checkpoint == str(second)
    expected = load_file(second / "model.safetensors")
    found = built.trainer.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    why = "it is gone" if damage == "gone" else "model.safetensors has changed since it was written"
    assert f"warning: {best} has the best model, but cannot be used: {why}" in capsys.readouterr().err


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_a_resume_at_the_last_step_trains_nothing(tmp_path, tiny_model, scheduler):
    values = {"trainer": "sft", "scheduler": scheduler, "lr": 1e-2, "resume": True, **SAVES}
    trained = train(build(tmp_path, tiny_model, **{**values, "resume": False})).trainer
    resumed = build(tmp_path, tiny_model, **values)
    assert resumed.trainer.last_step == 6
    train(resumed, resumed.trainer.find_checkpoint()[0])
    assert resumed.trainer.state.global_step == 6
    for name, value in resumed.trainer.model.state_dict().items():
        assert torch.equal(value, trained.model.state_dict()[name]), name


class Poison:
    """An object whose pickle runs code."""

    def __reduce__(self):
        return os.mkdir, ("poisoned",)


@pytest.mark.parametrize("content", ["poison", "text"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_file_that_cannot_be_read_is_named_though_its_hash_is_right(
    tmp_path, tiny_model, monkeypatch, name, content
):
    monkeypatch.chdir(tmp_path)
    folder = fake_checkpoint(tmp_path / "run", 4, Layout("none", None, 1, 2, 1))
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / name).write_text("text")
    if content == "poison":
        torch.save({"state": Poison()}, folder / name)
    manifest = read_manifest(folder)
    files = [entry_of(folder, path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    replace(manifest, files=files).write(folder)
    assert why_unusable(folder, content=True) is None
    found = why_unreadable(folder / name)
    assert str(found).startswith("cannot be read: ") and len(str(found).splitlines()) == 1
    assert not (tmp_path / "poisoned").exists()
    trainer = build(tmp_path, tiny_model, trainer="sft", resume=True, **SAVES).trainer
    with pytest.raises(ConfigError, match=re.escape(f"skipped {folder}: {name} cannot be read")):
        trainer.find_checkpoint()


@pytest.mark.parametrize("peft", [False, True])
def test_a_resume_ends_with_the_same_weights(tmp_path, tiny_model, peft):
    values = {"trainer": "sft", "peft": peft, "quantization": None, "save_total_limit": 3, **SAVES}
    complete = train(build(tmp_path, tiny_model, **values)).trainer
    trained = {n: p.clone() for n, p in complete.model.named_parameters() if p.requires_grad}
    torch.manual_seed(7)
    torch.rand(13)  # a random state other than that of the first start
    resumed = build(tmp_path, tiny_model, resume=str(tmp_path / "run" / "checkpoint-4"), **values)
    train(resumed, resumed.trainer.find_checkpoint()[0])
    for name, parameter in resumed.trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trained[name]), name


@pytest.fixture(scope="module", params=[False, True], ids=["full", "adapter"])
def saved(request, tmp_path_factory, tiny_model) -> tuple[Path, dict]:
    """A folder with checkpoint-2 of a short run, and the values of the run."""
    work = tmp_path_factory.mktemp("saved")
    values = {"trainer": "sft", "peft": request.param, "quantization": None, **SAVES, "max_steps": 2}
    train(build(work, tiny_model, **values))
    return work / "run" / "checkpoint-2", values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights, name: weights.pop(name), "it lacks "),
        (
            lambda weights, name: weights.update({name.replace("layers.1", "layers.9"): weights[name] + 1}),
            "it has ",
        ),
        (lambda weights, name: weights.update({name: weights[name][:-1].contiguous()}), ""),
    ],
    ids=["missing", "unknown", "of another shape"],
)
def test_a_weight_that_does_not_fit_ends_the_resume(tmp_path, tiny_model, saved, change, words):
    checkpoint, values = saved
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    [file] = folder.glob("*model.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if "layers.1" in name)
    change(weights, name)
    save_file(weights, file, metadata={"format": "pt"})
    trainer = build(tmp_path, tiny_model, **values).trainer
    with pytest.raises(ConfigError, match=re.escape(f"{folder}: {words}")):
        trainer._load_from_checkpoint(str(folder))


class OfDeepSpeed:
    """A class that only the checkpoints of DeepSpeed have."""


def test_a_checkpoint_of_another_backend_is_refused_and_not_taken_for_a_damaged_one(tmp_path, tiny_model):
    folder = fake_checkpoint(tmp_path / "run", 4, Layout("deepspeed", 2, 1, 2, 1))
    torch.save({"state": OfDeepSpeed()}, folder / "a_optim_states.pt")
    files = [entry_of(folder, path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    replace(read_manifest(folder), files=files).write(folder)
    trainer = build(tmp_path, tiny_model, trainer="sft", resume=True, **SAVES).trainer
    with pytest.raises(ConfigError, match="it was written by ZeRO 2, which ddp cannot read"):
        trainer.find_checkpoint()


def test_a_signal_while_the_ranks_exchange_that_there_is_none_stops_the_run(
    tmp_path, tiny_model, monkeypatch
):
    """A rank that waits there for the others is the likeliest to get one."""
    monkeypatch.setattr(step_boundary, "stop", stop := Stop())
    monkeypatch.setattr(saving, "stop", stop)
    built = build(tmp_path, tiny_model, trainer="sft", **SAVES)
    exchange = built.trainer.agreement.maximum

    def maximum(*values):
        found = exchange(*values)
        if built.trainer.state.global_step == 3 and len(values) == 4:  # at the end of the step
            stop.requested = signal.SIGTERM  # as its handler does
        return found

    monkeypatch.setattr(built.trainer.agreement, "maximum", maximum)
    train(built)
    assert stop.saved == "saved at step 4"
