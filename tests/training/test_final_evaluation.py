"""The evaluation on the test split, repeated alone: the final model is loaded, and no step is taken."""

from __future__ import annotations

import json

import pytest
from inprocess import PEFT, ROWS, build, write_split

from trainers.config.kinds import KINDS
from trainers.loop.final_evaluation import evaluate, is_due, is_too_late
from trainers.loop.finish import save_final_model
from trainers.loop.step_boundary import StepBoundary
from trainers.storage.ending import MERGE, read_ending

CELLS = {name: {"trainer": name} for name in KINDS} | {
    "sft with LoRA": {"trainer": "sft", **PEFT},
    "dpo with LoRA": {"trainer": "dpo", **PEFT},
    "dpo, reference first": {"trainer": "dpo", "precompute_ref_log_probs": True},
}
FAST = ("sft with LoRA", "dpo, reference first")


@pytest.mark.parametrize(
    "cell", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CELLS]
)
def test_it_gives_the_same_loss_as_after_training(tmp_path, tiny_model, tiny_masked_model, cell):
    kind = CELLS[cell]["trainer"]
    model = tiny_masked_model if kind == "mlm" else tiny_model
    values = {"test_split": "test", "max_steps": 3, "lr": 1e-2, **CELLS[cell]}
    (tmp_path / "data").mkdir()
    write_split(tmp_path / "data" / "test.jsonl", ROWS[:4])
    built = build(tmp_path, model, **values)
    built.trainer.add_callback(StepBoundary(built.trainer, None))
    built.trainer.train()
    ending = save_final_model(built.trainer, built.context)
    assert is_due(built.context, ending)
    evaluate(built.trainer, built.context, ending)
    folder = built.context.folder
    assert json.loads((folder / "finished.json").read_text())["done"] == ["evaluation"]

    again = build(tmp_path, model, **values)
    again.trainer.add_callback(StepBoundary(again.trainer, None))
    ended = read_ending(folder)
    assert ended is not None and not is_due(again.context, ended)
    ended.done.clear()
    assert is_due(again.context, ended)
    for name in ("other.safetensors", "model-mine.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("a file of the user")
    again.trainer.load_final_model(folder, ended.names(folder))
    assert again.trainer.state.global_step == 3 and not again.trainer.is_in_train
    evaluate(again.trainer, again.context, ended)
    assert ended.metrics["test_loss"] == ending.metrics["test_loss"]
    untrained = build(tmp_path, model, **values)
    untrained.trainer.eval_dataset = untrained.context.rows("test")
    assert untrained.trainer.evaluate()["eval_loss"] != ending.metrics["test_loss"], (
        "the steps make a difference"
    )


def test_it_is_not_due_after_a_merge(tmp_path, tiny_model):
    """The adapter is gone. The run had no test split before."""
    built = build(tmp_path, tiny_model, trainer="sft", test_split="train")
    ending = save_final_model(built.trainer, built.context)
    ending.done.append(MERGE)
    assert is_too_late(built.context, ending) and not is_due(built.context, ending)
