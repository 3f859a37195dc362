"""The loss of a step is the mean over all its tokens, also for models that declare otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.model.token_mean import divide_by_all_tokens

TEXT = {**SIZES, "head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}  # fmt: skip


@pytest.fixture
def model() -> Any:
    config = AutoConfig.for_model("gemma4", text_config=TEXT)
    return AutoModelForCausalLM.from_config(config)


def test_a_model_that_takes_the_number_of_tokens_gets_it(model: Any) -> None:
    assert model.accepts_loss_kwargs is False, "the library passes it now: is this module needed?"
    divide_by_all_tokens(model)
    assert model.accepts_loss_kwargs is True


@pytest.mark.parametrize("why", ["takes no number", "does not divide"])
def test_a_model_that_does_not_is_named(
    model: Any, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = type(model).forward

    def other(self: Any, num_items_in_batch: int | None = None, **inputs: Any) -> Any:
        if num_items_in_batch and why == "takes no number":
            raise TypeError
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", other)
    divide_by_all_tokens(model)
    assert model.accepts_loss_kwargs is False
    assert capsys.readouterr().out.startswith(
        "note: loss: Gemma4ForConditionalGeneration takes the mean over"
    )


def test_other_models_are_not_computed() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    divide_by_all_tokens(model)
    assert not hasattr(model, "accepts_loss_kwargs")
