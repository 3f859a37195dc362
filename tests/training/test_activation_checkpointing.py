"""Activation checkpointing changes memory and time, but no loss and no gradient; and it has an effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers.config.errors import ConfigError
from trainers.config.kinds import KINDS

LAYERS, STEPS = 2, 2
RUN = {"max_steps": STEPS, "lr": 1e-2, "quantization": None, "lora_dropout": 0.0}


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, tiny_masked_model: Path) -> Callable[..., Any]:
    """`make(trainer, mode, **config)`: a trainer that has not taken a step."""

    def trainer_of(trainer: str, mode: str, **config: Any) -> Any:
        set_seed(42)
        model = tiny_masked_model if trainer == "mlm" else tiny_model
        more = {**RUN, "trainer": trainer, "activation_checkpointing": mode, **config}
        return build(tmp_path, model, **{"attention": "sdpa", **more}).trainer  # one call per layer

    return trainer_of


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class Operations(TorchDispatchMode):
    """Counts what the dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Trained:
    """The results of a run, and how often its parts ran."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    layers: int  # calls in forwards with gradients
    attention: int
    backwards: int = field(default=0)


def train(trainer: Any) -> Trained:
    """Train, and count the calls of layers and attention."""
    gradients, operations, layers = Gradients(), Operations(), 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal layers
        layers += module.training and torch.is_grad_enabled()

    for layer in trainer.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.mlp.register_forward_pre_hook(count)  # a hook of the layer itself would not run again
    trainer.add_callback(gradients)
    with operations:
        trainer.train()
    attention = {name: n for name, n in operations.seen.items() if "scaled_dot_product" in name}
    backwards = sum(n for name, n in attention.items() if "backward" in name)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(losses, gradients.steps, layers, sum(attention.values()) - backwards, backwards)


def check_same(one: Trained, other: Trained) -> None:
    assert len(one.losses) == len(one.gradients) == STEPS
    assert other.losses == pytest.approx(one.losses, abs=1e-6)
    for before, after in zip(one.gradients, other.gradients, strict=True):
        assert before.keys() == after.keys() and before
        for name, gradient in before.items():
            torch.testing.assert_close(after[name], gradient, atol=1e-6, rtol=1e-5)


def some(names: tuple[str, ...]) -> list[Any]:
    """Return all trainers; make test takes those of these names."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in KINDS]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("trainer", some(("sft", "reward", "dpo", "mlm")))
def test_every_mode_gives_the_same_losses_and_gradients_and_has_an_effect(make, trainer, peft):
    """Between the steps, dpo and kto use a reference model. TRL switches checkpointing off for it, and on."""
    none, full, selective = (train(make(trainer, mode, peft=peft)) for mode in ("none", "full", "selective"))
    check_same(none, full)
    check_same(none, selective)
    once = LAYERS * STEPS
    assert none.backwards == full.backwards == selective.backwards == once
    assert (none.layers, full.layers, selective.layers) == (once, 2 * once, 2 * once)
    assert full.attention == none.attention + once, "attention runs again in the backward"
    assert selective.attention == none.attention, "the output of attention is kept"


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_selective_works_with_a_quantised_base(make, quantization):
    """TRL prepares such a model itself, and switches checkpointing on in this preparation (orpo)."""
    for trainer in ("sft", "orpo"):
        values = {"peft": True, "quantization": quantization}
        none, selective = (train(make(trainer, mode, **values)) for mode in ("none", "selective"))
        check_same(none, selective)
        assert selective.attention == none.attention and selective.layers == 2 * none.layers


def test_evaluation_is_not_checkpointed(make):
    trainer = make("sft", "selective")
    before = Operations()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with before, torch.no_grad():
        trainer.model(input_ids=batch["input_ids"])
    assert sum(n for name, n in before.seen.items() if "scaled_dot_product" in name) == LAYERS


def test_offload_without_a_gpu_is_refused_in_the_rank_too(make):
    with pytest.raises(ConfigError, match=r"no GPU, so activations are in host memory already\. Use full"):
        make("sft", "offload")


@pytest.mark.parametrize("trainer", ["sft", "dpo", "mlm"])
def test_offload_keeps_the_input_of_each_layer_and_nothing_else(make, trainer, monkeypatch):
    """The tensors that would go to host memory are counted. They are not copied, because there is no GPU."""
    from transformers import modeling_utils

    from trainers.loop import life

    moved: list[torch.Tensor] = []

    class Moved(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            assert pin_memory
            super().__init__(lambda tensor: moved.append(tensor) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(modeling_utils, "save_on_cpu", Moved)
    none = train(make(trainer, "none"))
    monkeypatch.setattr(life, "check_requirements", lambda *_: None)  # it refuses offload without a GPU
    offloaded = train(make(trainer, "offload"))
    check_same(none, offloaded)
    assert offloaded.layers == 2 * none.layers
    states = [tensor for tensor in moved if tensor.dim() == 3]
    assert len(states) == LAYERS * STEPS
    assert all(tensor.numel() == 0 for tensor in moved if tensor.dim() != 3), "torch's own dummy"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trainer", KINDS)
def test_offload_works_on_a_gpu(make, trainer):
    none, offloaded = (train(make(trainer, mode)) for mode in ("none", "offload"))
    assert offloaded.losses == pytest.approx(none.losses, abs=1e-4)
    assert offloaded.layers == 2 * none.layers


def reentrancy_of(trainer: Any) -> list[Any]:
    layers = (m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer))
    return [layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers]


@pytest.mark.parametrize("trainer", some(("sft", "dpo", "orpo", "mlm")))
def test_zero_3_with_an_adapter_is_reentrant_for_every_trainer(make, trainer, monkeypatch):
    """TRL sets it only in some of its trainers, with arguments that transformers no longer reads."""
    from transformers.integrations import deepspeed

    def under_zero_3(mode: str, peft: bool) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
            return make(trainer, mode, peft=peft)

    expected = train(make(trainer, "none", peft=True))
    adapter = under_zero_3("full", peft=True)
    found = train(adapter)
    assert reentrancy_of(adapter) == [True] * LAYERS
    check_same(expected, found)
    assert found.layers == expected.layers, "the first forward of a reentrant layer is without gradients"
    for other in (lambda: under_zero_3("full", peft=False), lambda: make(trainer, "full", peft=True)):
        built = other()
        built.train()
        assert reentrancy_of(built) == [False] * LAYERS


def test_a_model_without_activation_checkpointing_is_refused(make, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not support it\. Use none"):
        make("sft", "full")
    assert len(train(make("sft", "none")).losses) == STEPS


def test_a_model_that_takes_no_options_refuses_selective(make, monkeypatch):
    from transformers import LlamaForCausalLM

    def old(self: Any, module: Any, value: bool = False) -> None:
        module.gradient_checkpointing = value

    monkeypatch.setattr(LlamaForCausalLM, "_set_gradient_checkpointing", old)
    with pytest.raises(ConfigError, match="LlamaForCausalLM supports only full and none"):
        make("sft", "selective")
