"""torch_compile compiles only the layers, once for all of them, and keeps the names of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import build, logged
from safetensors import safe_open
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers.config.errors import ConfigError
from trainers.config.kinds import KINDS

RUN = {"lr": 1e-2, "max_steps": 4, "batch_size": 2, "packing": "none", "quantization": None}


def trainer_of(work: Path, model: Path, **config: Any) -> Any:
    set_seed(42)
    return build(work, model, **{**RUN, **config})


@pytest.mark.parametrize("trainer", KINDS)
def test_the_layers_are_compiled_and_keep_the_names_of_their_weights(
    tmp_path, tiny_model, tiny_masked_model, trainer
):
    """Nothing is compiled before a layer is called. TRL puts adapters into the layers later."""
    model = tiny_masked_model if trainer == "mlm" else tiny_model
    for peft in (False, True):
        plain, compiled = (
            trainer_of(tmp_path, model, trainer=trainer, peft=peft, torch_compile=choice).trainer.model
            for choice in (False, True)
        )
        names = [type(m).__name__ for m in compiled.modules() if m._compiled_call_impl is not None]
        assert len(names) == 2 and set(names) <= {"LlamaDecoderLayer", "ModernBertEncoderLayer"}
        assert compiled.state_dict().keys() == plain.state_dict().keys()
        assert not [m for m in plain.modules() if m._compiled_call_impl is not None]


def test_a_model_without_layers_is_refused():
    from trainers.model.compilation import compile_layers

    with pytest.raises(ConfigError, match="torch_compile: no layers were found in Linear"):
        compile_layers(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("trainer", ["sft", "dpo", "mlm"])
def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(
    tmp_path, tiny_model, tiny_masked_model, trainer, mode
):
    from torch._dynamo.utils import counters

    from trainers.loop import finish

    model = tiny_masked_model if trainer == "mlm" else tiny_model
    values = {"trainer": trainer, "activation_checkpointing": mode}
    expected = [entry["loss"] for entry in logged(trainer_of(tmp_path, model, **values))]
    torch._dynamo.reset()
    counters.clear()
    built = trainer_of(tmp_path, model, torch_compile=True, **values)
    assert [entry["loss"] for entry in logged(built)] == pytest.approx(expected, abs=1e-4)
    # Once for the first length, once more for any length; 2 layers of 2 kinds at most.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    finish.save_final_model(built.trainer, built.context)
    with safe_open(built.context.folder / "model.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if "_orig_mod" in name]  # noqa: SIM118


def test_the_layers_have_the_layer_class_of_transformers(tiny_model):
    from transformers import AutoModelForCausalLM

    layers = AutoModelForCausalLM.from_pretrained(tiny_model).model.layers
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
