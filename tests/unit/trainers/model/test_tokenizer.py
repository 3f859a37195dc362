"""The tokenizer of a run: its padding token, its template, and what is saved with it."""

from __future__ import annotations

import json

import pytest
from inprocess import build, settings_of
from rows import END

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.model.tokenizer import load_tokenizer


def test_padding_is_not_the_token_that_ends_an_answer(tmp_path, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found, gained = load_tokenizer(settings_of(trainer="sft", model=str(tmp_path / "tokenizer")).train)
    assert found.pad_token == "<pad>" != found.eos_token
    assert gained == [] and len(found) == len(tokenizer), "no token is added for it"


@pytest.mark.parametrize("trainer", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("pad", [END, None, "<pad>"])
def test_padding_is_not_the_end_of_a_turn(run_tokenizer, pad, trainer):
    found = run_tokenizer(pad=pad, trainer=trainer)
    assert found.pad_token == "<pad>"
    assert found.pad_token_id != found.eos_token_id
    found = run_tokenizer(pad=pad, trainer=trainer, chat_template="phi3")
    assert found.eos_token == "<|end|>"
    assert found.pad_token_id not in (None, found.eos_token_id)


def test_preparing_rows_leaves_no_truncation_in_the_saved_tokenizer(tmp_path, tiny_masked_model):
    for _ in ("empty cache", "full cache"):
        built = build(tmp_path, tiny_masked_model, trainer="mlm", block_size=32)
        built.context.tokenizer.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
        assert saved["truncation"] is None and saved["padding"] is None


def test_mlm_refuses_a_causal_model(tiny_model):
    with pytest.raises(ConfigError, match=r"has no mask token, so it is not a masked LM"):
        load_tokenizer(TrainConfig(model=str(tiny_model), trainer="mlm"))


def test_a_template_that_the_tokenizer_does_not_have_is_refused(tiny_masked_model):
    config = TrainConfig(model=str(tiny_masked_model), trainer="mlm", chat_template="tokenizer")
    with pytest.raises(
        ConfigError, match=r"chat_template: the tokenizer of this model has none\. Use chatml"
    ):
        load_tokenizer(config)
