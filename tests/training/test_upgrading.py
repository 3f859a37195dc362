"""Parts of transformers and TRL that Phalanx overrides or copies: they are called, and do what we expect.

docs/upgrading.md names each test with its part.
"""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
from inprocess import build, logged

from trainers.loop.step_boundary import StepBoundary

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "batch_size": 2}


def test_the_gradient_norm_of_each_step_is_checked(tmp_path, tiny_model, monkeypatch):
    built = build(tmp_path, tiny_model, trainer="sft", batch_size=2, max_steps=2)
    norms: list[float] = []
    monkeypatch.setattr(built.trainer.watch, "record_norm", lambda norm: norms.append(float(norm)))
    entries = logged(built)
    assert norms == pytest.approx([entry["grad_norm"] for entry in entries]) and len(norms) == 2
    assert all(map(math.isfinite, norms))


def test_each_part_of_a_save_tolerates_a_full_disk(tmp_path, tiny_model, monkeypatch):
    """The parts after the first that fails are called too, because there the ranks wait for each other."""
    from transformers import Trainer, TrainerState

    called: list[str] = []

    def full(name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            called.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return fail

    built = build(tmp_path, tiny_model, trainer="sft", **{**SAVES, "save_steps": 2})
    built.trainer.add_callback(StepBoundary(built.trainer, None))
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        monkeypatch.setattr(Trainer, name, full(name))
    monkeypatch.setattr(TrainerState, "save_to_json", lambda *_: called.append("the state of the trainer"))
    built.trainer.train()
    assert called == [
        "save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "the state of the trainer"
    ]  # fmt: skip
    assert built.trainer.state.global_step == 2 and not (tmp_path / "run" / "saving").exists()


def test_a_checkpoint_has_no_card_of_trl(tmp_path, tiny_model):
    built = build(tmp_path, tiny_model, trainer="sft", **SAVES)
    built.trainer.add_callback(StepBoundary(built.trainer, None))
    built.trainer.train()
    run = tmp_path / "run"
    assert (run / "checkpoint-2" / "manifest.json").exists()
    assert list(run.rglob("README.md")) == []


def test_precomputing_shows_no_progress_bar(tmp_path, tiny_model, capsys):
    for trainer in ("dpo", "kto"):
        build(tmp_path / trainer, tiny_model, trainer=trainer, precompute_ref_log_probs=True)
    assert "%" not in capsys.readouterr().err


def test_kto_reads_its_samples_in_their_order(tmp_path: Path, tiny_model: Path) -> None:
    built = build(tmp_path, tiny_model, trainer="kto", batch_size=2)
    expected = [row["prompt_ids"] + row["completion_ids"] for row in built.context.rows("train")]
    found = [
        ids[mask.bool()].tolist()
        for batch in built.trainer.get_train_dataloader()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert found == expected and len(found) == 6
