"""Saving and resuming in one process: the files of a checkpoint, when it is written, which ones are kept."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from inprocess import build

from trainers.loop import step_boundary
from trainers.loop.step_boundary import StepBoundary
from trainers.storage.manifest import checkpoint_folders, read_manifest, why_unusable


def train(built, checkpoint: Path | None = None):
    """Train as a run does, with the callback of all runs."""
    built.trainer.add_callback(StepBoundary(built.trainer, checkpoint))
    built.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return built


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
    scores = iter([0.1, 0.5, 0.9])
    evaluate = built.trainer.evaluate

    def scored(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval_loss": next(scores)}

    monkeypatch.setattr(built.trainer, "evaluate", scored)
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
