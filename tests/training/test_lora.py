"""The tokens that a template adds are trained with an adapter."""

from __future__ import annotations

import pytest
import torch
from inprocess import PEFT, build, logged, outputs


@pytest.mark.parametrize("trainer", ["default", "sft", "dpo", "orpo", "kto", "reward"])
def test_new_tokens_are_trained_in_the_embedding_and_in_the_output(tmp_path, tiny_model, trainer):
    """The output of this model is not tied to its embedding. The frozen reference must not change."""
    asked = (
        {"prompt_text_column": "prompt", "text_column": "completion"} if trainer in ("default", "sft") else {}
    )
    built = build(tmp_path, tiny_model, trainer=trainer, chat_template="phi3", **PEFT, **asked)
    model = built.trainer.model
    rows = {name: p for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name}
    assert {name.split(".token_adapter")[0].rpartition(".")[2] for name in rows} == (
        {"embed_tokens"} if trainer == "reward" else {"embed_tokens", "lm_head"}
    )
    before = {name: p.detach().clone() for name, p in rows.items()}
    assert {p.shape[0] for p in before.values()} == {4}
    first = logged(built)[0]["loss"]
    assert first == pytest.approx({"dpo": 0.6931, "kto": 0.5}.get(trainer, first), abs=1e-3)
    for name, p in rows.items():
        assert not torch.equal(p, before[name]), name
    if trainer in ("dpo", "kto"):
        ids = built.context.rows("train")[0]["prompt_ids"]
        with model.disable_adapter():
            as_it_was = outputs(model, ids)
        fresh = build(tmp_path, tiny_model, trainer=trainer, chat_template="phi3", **PEFT).trainer.model
        with fresh.disable_adapter():
            torch.testing.assert_close(as_it_was, outputs(fresh, ids), atol=1e-5, rtol=0)
