"""The reference of dpo and kto."""

from __future__ import annotations

import pytest
import torch
from inprocess import PEFT, build, logged
from tiny import build_tiny_model


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_policy_and_reference_have_the_same_embeddings_of_new_tokens(tmp_path, tiny_model, trainer):
    built = build(tmp_path, tiny_model, trainer=trainer, chat_template="zephyr")
    policy, reference = built.trainer.model, built.trainer.ref_model
    assert len(built.context.new_tokens) == 3
    for one, other in zip(policy.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert logged(built)[0]["loss"] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[trainer], abs=1e-3)


def test_model_ref_is_used_with_an_adapter_too(tmp_path, tiny_model, tmp_path_factory):
    """AutoTrain sets it to None in this case, without a message."""
    other = build_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)
    built = build(tmp_path, tiny_model, trainer="dpo", model_ref=str(other), **(PEFT | {"max_steps": 1}))
    assert logged(built)[0]["loss"] != pytest.approx(0.6931, abs=1e-3)
