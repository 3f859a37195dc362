"""Which weights text does not reach, in models of many kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trainers.model import reach
from trainers.model.reach import freeze_unreached, unreached

SEEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14}  # fmt: skip
BLOCKS = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
CLIP = {"model_type": "clip_vision_model", **SEEN}
LLAMA = {"model_type": "llama", **SIZES}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLLAMA = {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64,
          "intermediate_layers_indices": [0]}  # fmt: skip
# kind -> (the configs of its parts, what text does not reach)
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gemma3": (
        {"text_config": SIZES, "vision_config": SEEN},
        {"model.vision_tower", "model.multi_modal_projector"},
    ),
    "llava_next": (
        {"text_config": LLAMA, "vision_config": CLIP},
        {"model.vision_tower", "model.multi_modal_projector", "model.image_newline"},
    ),
    "idefics3": (
        {"text_config": LLAMA, "vision_config": SEEN, "pad_token_id": 0},
        {"model.vision_model", "model.connector"},
    ),
    "qwen2_5_vl": ({"text_config": {**SIZES, **SECTIONS}, "vision_config": BLOCKS}, {"model.visual"}),
    "qwen3_vl_moe": (
        {"text_config": {**SIZES, **EXPERTS, **SECTIONS}, "vision_config": BLOCKS},
        {"model.visual"},
    ),
    "mllama": (
        {
            "text_config": {**SIZES, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {**SEEN, **MLLAMA},
        },
        {"model.layers.1"},  # the causal LM has no vision tower, but layers that look at its output
    ),
}


def build(kind: str) -> Any:
    config = AutoConfig.for_model(kind, **MODELS[kind][0])
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)  # the trainers take the first
    return next(one for one in classes if type(config) in one._model_mapping).from_config(config)


@pytest.mark.parametrize("kind", MODELS)
def test_text_does_not_reach_what_only_images_reach(kind: str) -> None:
    assert set(unreached(build(kind))) == MODELS[kind][1]


def test_what_is_found_is_frozen_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("gemma3")
    model.config.text_config.attention_dropout = 0.5
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    state = torch.get_rng_state()
    assert freeze_unreached(model) == ["model.vision_tower", "model.multi_modal_projector"]
    assert torch.get_rng_state().equal(state), "a run must not depend on it"
    for name, weight in model.named_parameters():
        assert weight.equal(before[name])
        assert weight.requires_grad == ("language_model" in name or "lm_head" in name), name
    count = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    assert capsys.readouterr().out == (
        f"frozen: model.vision_tower, model.multi_modal_projector, {count / 1e6:.1f}M weights: text does not "
        "reach them\n"
    )


def test_a_model_of_text_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "unreached", lambda model: pytest.fail("it was computed"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    assert freeze_unreached(model) == []


def test_the_text_part_of_a_model_is_computed() -> None:
    assert freeze_unreached(build("mllama")) == ["model.layers.1"]


def test_a_model_that_needs_more_than_text_is_trained_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("gemma3")
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: inputs["pixel_values"])
    assert freeze_unreached(model) == []
    assert all(weight.requires_grad for weight in model.parameters())
    assert capsys.readouterr().out.startswith("note: all weights are trained: what text does not reach")


class Routed(nn.Module):
    """A layer that uses some of its experts, and another module never."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.tables = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(3))
        self.other = nn.ModuleList([nn.Linear(2, 2)])
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)])


def test_an_expert_without_a_token_is_not_frozen() -> None:
    model = Routed()
    reached = {id(w) for part in (model.experts[1], model.layers[0]) for w in part.parameters()}
    reached.add(id(model.tables[0]))
    found = reach._largest(model, "", lambda part: any(id(w) in reached for w in reach._weights_of(part)))
    assert dict(found) == {"other": 6, "layers.1": 10}
