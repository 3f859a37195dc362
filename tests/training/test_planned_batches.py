"""Packed steps have the losses and gradients of unpacked ones, and evaluations do not depend on batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ATTENTIONS
from inprocess import ROWS, build, logged

from trainers.data.sampler import Batches

TRAINERS = {
    "default": {"packing": "bfd"},
    "sft": {"prompt_text_column": "prompt", "text_column": "completion"},
    "reward": {"text_column": "chosen", "rejected_text_column": "rejected"},
    "dpo": {"prompt_text_column": "prompt", "text_column": "chosen", "rejected_text_column": "rejected"},
    "orpo": {"prompt_text_column": "prompt", "text_column": "chosen", "rejected_text_column": "rejected"},
    "kto": {"prompt_text_column": "prompt", "text_column": "completion"},
}


def step(work: Path, model: Path, **values: Any) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of a step over all rows."""
    found: list[torch.Tensor] = []
    built = build(work, model, max_grad_norm=0.0, lr=0.0, **values)

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    built.trainer.add_callback(Keep())
    return logged(built)[0]["loss"], found[0]


def test_a_second_loader_takes_the_place_of_the_first(tmp_path, tiny_model, capfd):
    """A resume makes one to know its last step. Two samplers would both follow the epochs, with a warning."""
    trainer = build(tmp_path, tiny_model, trainer="sft").trainer
    for _ in range(2):
        batches = trainer.get_train_dataloader().batch_sampler
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, Batches)]
    assert len(found) == 1 and found[0] is getattr(batches, "batch_sampler", batches)
    assert "You are adding" not in capfd.readouterr().err


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_packed_step_has_the_loss_and_gradient_of_an_unpacked_one(tmp_path, tiny_model, trainer):
    values = TRAINERS[trainer]
    plain = step(tmp_path / "plain", tiny_model, trainer=trainer, **{**values, "packing": "none"})
    variants: dict[str, dict[str, Any]] = {a: {"attention": a} for a in ATTENTIONS}
    if trainer != "kto":
        variants["filled to a budget"] = {
            "tokens_per_batch": 260, "gradient_accumulation": 8, "attention": "documents"
        }  # fmt: skip
    for name, own in variants.items():
        loss, gradient = step(tmp_path / name.replace(" ", "-"), tiny_model, trainer=trainer, **values, **own)
        assert loss == pytest.approx(plain[0], abs=1e-5), name
        torch.testing.assert_close(gradient, plain[1], rtol=1e-4, atol=1e-5, msg=name)


# Not kto: its loss is defined over a micro-batch (arXiv 2402.01306, section 4.1).
@pytest.mark.parametrize(
    ("trainer", "size"),
    [
        pytest.param(trainer, size, marks=pytest.mark.slow if size == 1 and trainer != "sft" else [])
        for trainer in ("default", "sft", "reward", "dpo", "orpo", "mlm")
        for size in (1, 4)
    ],
)
def test_evaluation_does_not_depend_on_how_it_is_batched(
    tmp_path, tiny_model, tiny_masked_model, trainer, size
):
    model = tiny_masked_model if trainer == "mlm" else tiny_model
    values = {**TRAINERS.get(trainer, {}), "trainer": trainer, "valid_split": "train"}

    def evaluated(name: str, **more: Any) -> float:
        built = build(tmp_path / name, model, **{**values, **more})
        return float(built.trainer.evaluate()["eval_loss"])

    expected = evaluated("all", per_device_eval_batch_size=len(ROWS))
    found = [evaluated("packed", per_device_eval_batch_size=size)]
    if trainer != "mlm":
        found.append(evaluated("padded", per_device_eval_batch_size=size, eval_packing=False))
        found.append(evaluated("none", per_device_eval_batch_size=size, packing="none"))
    assert found == pytest.approx([expected] * len(found), abs=1e-5)


def test_a_packed_run_is_probed_before_its_first_step(tmp_path, tiny_model, monkeypatch):
    import trainers.model.isolation_probe

    asked = []
    monkeypatch.setattr(trainers.model.isolation_probe, "probe", lambda *arguments: asked.append(arguments))
    logged(build(tmp_path / "packed", tiny_model, trainer="sft"))
    assert len(asked) == 1
    logged(build(tmp_path / "padded", tiny_model, trainer="sft", packing="none"))
    assert len(asked) == 1
