"""Which models FSDP2 can shard through accelerate, and which of their modules are sharded by themselves."""

from __future__ import annotations

import pytest
from architectures import SIZES, build_model
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig

from trainers.config.errors import ConfigError
from trainers.model import fsdp

TEXT = {**SIZES, "head_dim": 16}


@pytest.fixture(autouse=True)
def by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")


def test_a_class_that_the_model_does_not_have_is_not_wrapped() -> None:
    vision = SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).to_dict()
    config = AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config)
    assert "SiglipTextEmbeddings" in model._no_split_modules, "accelerate would look for it"
    fsdp.choose_wrapped_modules(model)
    known = {type(module).__name__ for module in model.modules()}
    assert {"Gemma3DecoderLayer", "SiglipEncoderLayer"} <= set(model._no_split_modules) <= known


def test_a_model_with_buffers_in_its_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    config = AutoConfig.for_model("gemma4", text_config={**TEXT, **more, "global_head_dim": 16})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"cannot shard Gemma4\w+, because .* a buffer .* \(model\.\S+\)"):
        fsdp.check_buffers(model)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    fsdp.check_buffers(model)


@pytest.mark.parametrize("name", ["llama", "gemma3 with a window", "gpt2 with learnt positions"])
def test_other_models_are_accepted(name: str) -> None:
    fsdp.check_buffers(build_model(name))
