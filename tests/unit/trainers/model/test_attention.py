"""Which attention a run gets, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from inprocess import settings_of
from transformers import GPT2Config, LlamaConfig

from trainers.config import packages as installed_packages
from trainers.config.errors import ConfigError
from trainers.model.attention import choose_attention


def chosen(model: Any, **values: Any) -> tuple[str, str]:
    return choose_attention(settings_of(model="m", **values).train, model)


def test_without_a_gpu_documents_is_chosen():
    name, why = chosen(LlamaConfig(), trainer="sft")
    assert name == "documents"
    assert why == "flash_attention_2, varlen, flex_attention: there is no GPU"


def test_the_attention_of_the_config_is_chosen():
    assert chosen(LlamaConfig(), trainer="sft", attention="eager") == ("eager", "attention")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_flash_attention_2": True}, "use_flash_attention_2: flash_attention_2 cannot be used: there is "
         "no GPU. Set use_flash_attention_2: false, which selects documents here."),
        ({"attention": "varlen"}, "attention: varlen cannot be used: there is no GPU"),
        ({"attention": "flex_attention"}, "attention: flex_attention cannot be used: there is no GPU"),
    ],
)  # fmt: skip
def test_an_attention_that_is_not_available_is_an_error_with_the_reason(values, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        chosen(LlamaConfig(), trainer="sft", **values)


class Ampere:
    """A machine with such a GPU, as far as the choice of the attention checks."""

    def __init__(self, monkeypatch, packages=(), capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(installed_packages, "installed", lambda name: name in packages)


HALF = {"trainer": "sft", "mixed_precision": "bf16"}


def test_flash_attention_is_chosen_if_the_package_and_the_gpu_allow_it(monkeypatch):
    Ampere(monkeypatch, packages=("flash-attn",))
    assert chosen(LlamaConfig(), **HALF) == ("flash_attention_2", "the fastest for packed documents")


def test_without_flash_attention_varlen_is_chosen(monkeypatch):
    Ampere(monkeypatch)
    name, why = chosen(LlamaConfig(), **HALF)
    assert (name, why) == (
        "varlen",
        "flash_attention_2: the package flash-attn is not installed (pip install 'phalanx[flash-attn]')",
    )


def test_without_varlen_flex_attention_is_chosen(monkeypatch):
    Ampere(monkeypatch, capability=(7, 5))
    assert chosen(LlamaConfig(), **HALF)[0] == "flex_attention"
    Ampere(monkeypatch)
    assert chosen(LlamaConfig(), trainer="sft")[0] == "flex_attention", "float32 has no flash kernel"
    assert chosen(transformers.Gemma2Config(), **HALF)[0] == "flex_attention", "varlen cannot cap scores"


def test_a_model_that_attends_in_chunks_gets_a_mask(monkeypatch):
    config = LlamaConfig(layer_types=["chunked_attention"] * 32)
    assert chosen(config, trainer="sft") == (
        "sdpa",
        "flash_attention_2: there is no GPU; varlen: llama attends in chunks; "
        "flex_attention: there is no GPU; documents: llama attends in chunks",
    )


def test_a_masked_lm_keeps_its_own_attention():
    assert chosen(GPT2Config(), trainer="mlm")[0] == "sdpa"
