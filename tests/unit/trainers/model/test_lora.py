"""Which modules of a model get an adapter."""

from __future__ import annotations

import pytest
from inprocess import PEFT, build

from trainers.config.errors import ConfigError


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.layers\.1\..*(q|k)_proj", {"q_proj", "k_proj"}),
    ],
)
def test_target_modules_are_all_linear_a_list_or_a_regular_expression(tmp_path, tiny_model, targets, trained):
    built = build(tmp_path, tiny_model, trainer="sft", target_modules=targets, **PEFT)
    names = {name for name, p in built.trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == trained
    if "layers" in targets:
        assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize(
    ("trainer", "targets", "words"),
    [
        ("sft", "q_prok,v_proj", "q_prok matches no module of .* q_proj"),
        ("sft", r".*\.layers\.9\..*", "matches no module"),
        ("dpo", ".*", r"it matches lm_head\. The loss of dpo reads its weight without the adapter"),
    ],
)
def test_target_modules_that_do_not_exist_or_would_not_train_are_refused(
    tmp_path, tiny_model, trainer, targets, words
):
    with pytest.raises(ConfigError, match=words):
        build(tmp_path, tiny_model, trainer=trainer, target_modules=targets, **PEFT)
