"""The models that a run loads: the head of a reward model, and a reference."""

from __future__ import annotations

import pytest
import torch
from inprocess import build

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig


def test_the_head_of_a_reward_model_depends_only_on_the_seed(tmp_path, tiny_model):
    heads = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        heads.append(build(tmp_path, tiny_model, trainer="reward", seed=seed).trainer.model.score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_reward_model_that_has_its_head_keeps_it(tmp_path, tiny_model):
    built = build(tmp_path, tiny_model, trainer="reward")
    with torch.no_grad():
        built.trainer.model.score.weight.fill_(0.5)
    built.trainer.model.save_pretrained(tmp_path / "classifier")
    built.context.tokenizer.save_pretrained(tmp_path / "classifier")
    again = build(tmp_path, tmp_path / "classifier", trainer="reward", seed=7)
    assert torch.all(again.trainer.model.score.weight == 0.5)


def test_a_reference_with_another_tokenizer_is_refused(tiny_model, tiny_masked_model, tokenizer):
    from trainers.model.load import load_reference

    config = TrainConfig(model=str(tiny_model), model_ref=str(tiny_masked_model), trainer="dpo")
    with pytest.raises(
        ConfigError, match=r"^model_ref: the tokenizer of .* differs from that of .* same family\.$"
    ):
        load_reference(config, tokenizer)
